"""Both sources give the batches of a plain loop over the tasks, whatever the ranks and wherever training starts."""

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from metadiff import batches
from metadiff.backbones import build_backbone
from metadiff.bank_support import BankSupport
from metadiff.batches import FeatureSource, ImageSource
from metadiff.checkpoint import load_state
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.episode_images import EpisodePlan, MemoryEpisodes
from metadiff.episodes import EpisodeSampler, TaskSchedule
from metadiff.features import EmbedConfig, FeatureBank, FeaturesConfig, FeatureTransform, embed_images
from metadiff.images import AugmentConfig, ImageSet
from metadiff.learners import PrototypeLearner
from metadiff.metrics import read_rows
from metadiff.optimisation import TrainConfig
from metadiff.parallel import ALONE, Ranks
from metadiff.schedule import Schedule
from metadiff.targets import Targets
from metadiff.training import train

SEED, WAY, QUERY, BATCH, TASKS, SIDE = 3, 3, 2, 6, 10, 16
CPU = torch.device("cpu")
OFFSETS = np.array([0, 6, 13, 20, 28, 36])
IMAGES = ImageSet(
    np.random.default_rng(0).integers(0, 256, (36, SIDE, SIDE, 3), dtype=np.uint8),
    np.repeat(np.arange(5), np.diff(OFFSETS)),
    tuple("abcde"),
)
EVERYONE = [[ALONE], [Ranks(rank, 2) for rank in range(2)], [Ranks(rank, 4, elastic=True) for rank in range(4)]]
CLASSES = EpisodeSampler(OFFSETS, WAY, 1, 1, SEED).classes(np.arange(TASKS))


def bank_of(num_views: int = 1, dtype: type = np.float16, dim: int = 9) -> FeatureBank:
    views = np.abs(np.random.default_rng(1).standard_normal((num_views, OFFSETS[-1], dim))).astype(dtype)
    return FeatureBank(views, OFFSETS, IMAGES.classes)


def targets_of(kind: str = "ce", dim: int = 9, dtype: type = np.float32, scale: float = 0.7) -> Targets:
    shape = (TASKS, WAY, dim) if kind == "ce" else (len(OFFSETS) - 1, dim)
    return Targets(np.random.default_rng(2).standard_normal(shape).astype(dtype), CLASSES, scale)


def plan_of(shot: int, ranks: Ranks = ALONE) -> EpisodePlan:
    return EpisodePlan(EpisodeSampler(OFFSETS, WAY, shot, QUERY, SEED, "base"), TaskSchedule(TASKS, SEED), BATCH, ranks)


def plainly(bank: FeatureBank, transform: FeatureTransform, targets: Targets, shot: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One iteration, task and image after the other, from the definitions: (w_0, support features)."""
    sampler, schedule = EpisodeSampler(OFFSETS, WAY, shot, QUERY, SEED, "base"), TaskSchedule(TASKS, SEED)
    for iteration in itertools.count(start):
        every_view = np.random.default_rng([SEED, iteration]).integers(len(bank.views), size=(BATCH, WAY * shot))
        w_0, supports = [], []
        for place in range(BATCH):
            episode_ids = np.array([iteration * BATCH + place])
            (task,) = task_ids = schedule.task_ids(episode_ids)
            images = sampler.draw(episode_ids, task_ids).support.ravel()
            raw = [bank.views[view, image] for view, image in zip(every_view[place], images, strict=True)]
            supports.append(transform(np.stack(raw)))
            w = targets.weights[task] if targets.weights.ndim == 3 else targets.weights[targets.class_ids[task]]
            w_0.append(torch.from_numpy(w.astype(np.float32)) * targets.scale)
        yield torch.stack(w_0), torch.stack(supports)


@pytest.mark.parametrize("everyone", EVERYONE, ids=lambda ranks: f"{len(ranks)} ranks")
@pytest.mark.parametrize(("num_views", "kind", "dtype"), [(1, "ce", np.float32), (3, "ce", np.float16), (3, "mean", np.float32)])
@pytest.mark.parametrize(("shot", "start"), [(1, 0), (2, 700)])
def test_features_are_those_of_the_plain_loop(
    shot: int, start: int, num_views: int, kind: str, dtype: type, everyone: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metadiff.episode_images._EPISODES_AHEAD", 7)
    bank, targets = bank_of(num_views), targets_of(kind, dtype=dtype)
    transform = FeatureTransform.fit(bank.features, FeaturesConfig(power=0.5))
    source = FeatureSource(bank, transform, targets, SEED, CPU)
    shares = zip(*(source.batches(plan_of(shot, ranks), start) for ranks in everyone), strict=True)
    for step, (parts, (w_0, features)) in enumerate(
        zip(itertools.islice(shares, 9), plainly(bank, transform, targets, shot, start), strict=False)
    ):
        assert torch.equal(torch.cat([part for part, _ in parts]), w_0), step
        assert torch.equal(torch.cat([support.features for _, support in parts]), features), step
        means = features.view(BATCH, WAY, shot, -1).mean(2)
        torch.testing.assert_close(torch.cat([support.means for _, support in parts]), means, rtol=1e-6, atol=1e-7)


def test_a_bank_too_large_for_the_device_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, targets = bank_of(3), targets_of()
    transform = FeatureTransform.fit(bank.features, FeaturesConfig())
    resident, mapped = (FeatureSource(bank, transform, targets, SEED, CPU) for _ in range(2))
    expected = list(itertools.islice(resident.batches(plan_of(2), 4), 5))
    assert len({support.bank.data_ptr() for _, support in expected if isinstance(support, BankSupport)}) == 1, "one bank for all"
    monkeypatch.setattr(batches, "room", lambda device: 4 * bank.views.size - 1)
    found = list(itertools.islice(mapped.batches(plan_of(2), 4), 5))
    for (w_0, support), (same_w_0, same) in zip(found, expected, strict=True):
        assert isinstance(support, BankSupport)
        assert len(support.bank) == BATCH * WAY * 2, "only what the iteration needs"
        assert torch.equal(w_0, same_w_0)
        assert torch.equal(support.features, same.features)
        assert torch.equal(support.means, same.means)


def test_room_is_a_part_of_the_memory_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_CGROUP", tmp_path / "memory.max")
    of_machine = batches.room(CPU)
    assert of_machine > 2**20
    for written, expected in (("max\n", of_machine), ("4096\n", 1024.0), (f"{2**62}\n", of_machine)):
        (tmp_path / "memory.max").write_text(written)
        assert batches.room(CPU) == expected


def image_source(
    targets: Targets, transform: FeatureTransform, precision: str = "fp32", augment: AugmentConfig | None = None, images: ImageSet = IMAGES
):
    return ImageSource(
        lambda plan: MemoryEpisodes(images, plan, augment, SEED), build_backbone("conv4", 0).eval(), transform, targets, precision, CPU
    )


@pytest.fixture(scope="module")
def embedded() -> FeatureBank:
    """The bank of the images, in full precision."""
    features = np.concatenate(
        list(embed_images(IMAGES.images, build_backbone("conv4", 0).eval(), EmbedConfig(batch_size=16), None, 0, CPU))
    )
    return FeatureBank(features[None], OFFSETS, IMAGES.classes)


@pytest.fixture(scope="module")
def transform(embedded: FeatureBank) -> FeatureTransform:
    return FeatureTransform.fit(embedded.features, FeaturesConfig())


@pytest.mark.parametrize("everyone", EVERYONE, ids=lambda ranks: f"{len(ranks)} ranks")
@pytest.mark.parametrize(("shot", "start"), [(1, 0), (2, 5)])
def test_images_give_the_features_of_the_bank(
    embedded: FeatureBank, transform: FeatureTransform, shot: int, start: int, everyone: list[Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metadiff.episode_images._PIECE", 8)
    targets = targets_of(dim=embedded.views.shape[-1])
    out_of_bank = FeatureSource(embedded, transform, targets, SEED, CPU).batches(plan_of(shot), start)
    shares = zip(*(image_source(targets, transform).batches(plan_of(shot, ranks), start) for ranks in everyone), strict=True)
    for parts, (w_0, support) in zip(itertools.islice(shares, 4), out_of_bank, strict=False):
        assert torch.equal(torch.cat([part for part, _ in parts]), w_0)
        for name, bound in (("features", 1e-5), ("means", 1e-5)):
            torch.testing.assert_close(torch.cat([getattr(part, name) for _, part in parts]), getattr(support, name), rtol=0, atol=bound)
        assert torch.equal(torch.cat([part.labels for _, part in parts]), support.labels)


def test_both_sources_train_alike(embedded: FeatureBank, transform: FeatureTransform, tmp_path: Path) -> None:
    targets, schedule = targets_of("mean", embedded.views.shape[-1], scale=1.0), Schedule()
    sources = {"features": FeatureSource(embedded, transform, targets, SEED, CPU), "images": image_source(targets, transform)}
    settings = TrainConfig(iterations=60, batch_size=BATCH, learning_rate=1e-3, checkpoint_every=50)
    for name, source in sources.items():
        denoiser = build_denoiser(DenoiserConfig(), targets.dim, PrototypeLearner(), schedule)
        train(denoiser, schedule, partial(source.batches, plan_of(2)), settings, SEED, tmp_path / name, name)
    features, images = (read_rows(tmp_path / f"{name}.jsonl") for name in sources)
    assert [row["loss"] for row in images] == pytest.approx([row["loss"] for row in features], rel=1e-4)
    ours, theirs = (load_state(tmp_path / f"{name}.safetensors")["denoiser"] for name in sources)
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-4)


def test_augmented_images_give_other_features_of_the_same_tasks(embedded: FeatureBank, transform: FeatureTransform) -> None:
    targets = targets_of(dim=embedded.views.shape[-1])
    plain, rich = (next(image_source(targets, transform, augment=augment).batches(plan_of(2), 1)) for augment in (None, AugmentConfig()))
    assert torch.equal(plain[0], rich[0])
    assert (plain[1].features - rich[1].features).abs().max() > 0.01


def test_bf16_is_near_and_not_the_same(embedded: FeatureBank, transform: FeatureTransform) -> None:
    targets = targets_of(dim=embedded.views.shape[-1])
    full, rounded = (next(image_source(targets, transform, precision).batches(plan_of(2), 1))[1].features for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (full - rounded).norm() < 0.05 * full.norm()


class Watched:
    """Images that note which of them are looked at."""

    def __init__(self) -> None:
        self.shape, self.seen = IMAGES.images.shape, set()

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.seen |= set(rows.tolist())
        return IMAGES.images[rows]


def test_only_support_images_are_looked_at(embedded: FeatureBank, transform: FeatureTransform) -> None:
    watched = Watched()
    images = ImageSet(watched, IMAGES.labels, IMAGES.classes)  # type: ignore[arg-type]
    source = image_source(targets_of(dim=embedded.views.shape[-1]), transform, images=images)
    list(itertools.islice(source.batches(plan_of(1), 2), 1))
    assert watched.seen == set(plan_of(1).draw(2, 1).support.ravel().tolist())


def test_leaving_a_source_closes_its_images(embedded: FeatureBank, transform: FeatureTransform) -> None:
    closed = []

    class Images:
        def pieces(self, start: int):
            try:
                yield from MemoryEpisodes(IMAGES, plan_of(1)).pieces(start)
            finally:
                closed.append(True)

    targets = targets_of(dim=embedded.views.shape[-1])
    source = ImageSource(lambda plan: Images(), build_backbone("conv4", 0).eval(), transform, targets, "fp32", CPU)
    stream = source.batches(plan_of(1), 0)
    next(stream)
    assert not closed
    del stream
    assert closed
