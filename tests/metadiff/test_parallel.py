"""Two processes that train together leave what one would have left."""

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from metadiff.backbones import build_backbone, feature_dim
from metadiff.checkpoint import load_state, save_state
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, Batch, ImageSet, MemoryLoader
from metadiff.learners import PrototypeLearner, Support
from metadiff.metrics import read_rows
from metadiff.optimisation import TrainConfig
from metadiff.parallel import ALONE, Ranks
from metadiff.pretraining import Classifier, PretrainConfig, pretrain
from metadiff.schedule import Schedule
from metadiff.training import train
from tests.tasks import DIM, batches

WORLD = 2
SCHEDULE = Schedule()
SETTINGS = TrainConfig(iterations=60, batch_size=8, ema_decay=0.9, ema_start=20, checkpoint_every=50)
CLASSES, SIZE = 3, 16
PRESETS: dict[str, dict[str, Any]] = {
    **{preset: {"preset": preset} for preset in ("stable", "paper", "official", "consistent")},
    "scale": {"body": "scale", "output_mix": False},
    "bare": {"body": "none"},
}


def train_one(folder: Path, ranks: Ranks, name: str, stop: int | None = None, preset: str = "stable", seed: int = 0) -> None:
    """Train a denoiser; with `stop`, die in all ranks after so many iterations."""

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        yield from islice(batches(ranks, SETTINGS.batch_size, start), stop)
        raise KeyboardInterrupt

    denoiser = build_denoiser(DenoiserConfig(**PRESETS[preset]), DIM, PrototypeLearner(), SCHEDULE, seed=seed)
    train(denoiser, SCHEDULE, source, SETTINGS, 0, folder / name, name, ranks=ranks)


def train_elastic(folder: Path, ranks: Ranks, name: str, stop: int | None = None, size: int = 7) -> None:
    """Train on a batch that is cut into unequal shares; with `stop`, die in all ranks after so many iterations."""

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        yield from islice(batches(elastic, size, start), stop)
        raise KeyboardInterrupt

    elastic, settings = replace(ranks, elastic=True), replace(SETTINGS, batch_size=size)
    denoiser = build_denoiser(DenoiserConfig(), DIM, PrototypeLearner(), SCHEDULE)
    train(denoiser, SCHEDULE, source, settings, 0, folder / name, name, ranks=elastic)


def train_noticed(folder: Path, ranks: Ranks) -> list[int]:
    """Train until the iterations 45, with a notice from 20 on of which rank 0 alone is told, and again; returns where it began."""
    done, starts = [0], []

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        starts.append(start)
        for done[0], batch in enumerate(batches(ranks, SETTINGS.batch_size, start), start):
            if done[0] == 45 and not start:
                raise KeyboardInterrupt
            yield batch

    told = replace(ranks, notice=lambda: ranks.first and done[0] >= 20)
    for attempt in range(2):
        denoiser = build_denoiser(DenoiserConfig(), DIM, PrototypeLearner(), SCHEDULE, seed=attempt)
        with nullcontext() if attempt else pytest.raises(KeyboardInterrupt):
            train(denoiser, SCHEDULE, source, SETTINGS, 0, folder / "noticed", "noticed", ranks=told)
    return starts


def train_to_nan(folder: Path, ranks: Ranks) -> str:
    """The error where the last rank's targets alone are no numbers."""

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        for w_0, support in batches(ranks, SETTINGS.batch_size, start):
            yield w_0 * (float("nan") if ranks.rank == ranks.world - 1 else 1.0), support

    denoiser = build_denoiser(DenoiserConfig(), DIM, PrototypeLearner(), SCHEDULE)
    with pytest.raises(UserError) as caught:
        train(denoiser, SCHEDULE, source, SETTINGS, 0, folder / "nan", "nan", ranks=ranks)
    return str(caught.value)


class DyingLoader(MemoryLoader):
    """One that dies in the given epoch, in all ranks."""

    dies_in: int | None = None

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for step, batch in enumerate(super().epoch(epoch)):
            if epoch == self.dies_in and step:
                raise KeyboardInterrupt
            yield batch


def pretrain_one(folder: Path, ranks: Ranks, dies_in: int | None = None, rotation_weight: float = 0.0) -> Classifier:
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (24, SIZE, SIZE, 3), dtype=np.uint8)
    images = ImageSet(pixels, np.repeat(np.arange(CLASSES), 8), ("a", "b", "c"))
    settings = PretrainConfig(epochs=3, batch_size=8, precision="fp32", rotation_weight=rotation_weight)
    loader = DyingLoader(images, settings.batch_size, AugmentConfig(crop="shift"), 0, ranks)
    loader.dies_in = dies_in
    backbone = build_backbone("conv4", 0)
    classifier = Classifier(backbone, feature_dim(backbone, SIZE), CLASSES, 0)
    validated = []

    def validate(backbone: torch.nn.Module) -> float:
        validated.append(ranks.rank)
        backbone.eval()
        return float(len(validated))

    pretrain(classifier, loader, settings, folder, torch.device("cpu"), validate, ranks=ranks)
    assert set(validated) <= {0}
    return classifier


def everything(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """What the ranks do together, in one go, because starting processes takes seconds."""
    told: dict[str, Any] = {"agreed": ranks.agree(7 + ranks.rank), "mean": ranks.mean(torch.tensor([1.0, 2.0]) * ranks.rank).tolist()}
    ranks.barrier()
    for preset in PRESETS:
        train_one(folder, ranks, preset, preset=preset)
    with pytest.raises(KeyboardInterrupt):
        train_one(folder, ranks, "killed", stop=55)
    ranks.barrier()
    # Another start on every rank: what counts is in the checkpoint.
    train_one(folder, ranks, "killed", seed=1 + ranks.rank)
    train_elastic(folder, ranks, "elastic")
    with pytest.raises(KeyboardInterrupt):
        train_elastic(folder, ranks, "shrunk", stop=55)
    train_elastic(folder, ranks, "grown")
    told["noticed"] = train_noticed(folder, ranks)
    told["nan"] = train_to_nan(folder, ranks)
    for name, options in {"plain": {}, "rotated": {"rotation_weight": 0.5}, "killed": {"dies_in": 1}}.items():
        if "dies_in" in options:
            with pytest.raises(KeyboardInterrupt):
                pretrain_one(folder / f"pretrain-{name}", ranks, **options)
            options = {}
        classifier = pretrain_one(folder / f"pretrain-{name}", ranks, **options)
        told[name] = dict(classifier.named_parameters())
    return told


def one_rank(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), WORLD, rank)
    save_state(folder / f"told-{rank}", everything(folder, Ranks(rank, WORLD)))
    dist.destroy_process_group()


def run_ranks(target: Callable[..., None], *arguments: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("spawn").Process(target=target, args=(rank, *arguments, port)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WORLD


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks left."""
    folder = tmp_path_factory.mktemp("pair")
    with pytest.raises(KeyboardInterrupt):
        train_elastic(folder, ALONE, "grown", stop=55)
    assert (folder / "grown.checkpoint-50.json").exists()
    run_ranks(one_rank, folder)
    return folder


@pytest.fixture(scope="module")
def told(pair: Path) -> list[dict[str, Any]]:
    return [load_state(pair / f"told-{rank}") for rank in range(WORLD)]


def test_ranks_exchange_what_they_must(told: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        assert told[rank]["agreed"] == 7
        assert told[rank]["mean"] == [0.5, 1.0]


@pytest.mark.parametrize("preset", PRESETS)
def test_two_ranks_train_what_one_would_have(preset: str, pair: Path, tmp_path: Path) -> None:
    train_one(tmp_path, ALONE, preset, preset=preset)
    one, two = (load_file(folder / f"{preset}.safetensors") for folder in (tmp_path, pair))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    if preset != "bare":
        losses = [[row["loss"] for row in read_rows(folder / f"{preset}.jsonl")] for folder in (tmp_path, pair)]
        assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_unequal_shares_train_what_one_rank_would_have_and_so_do_ranks_that_become_more_or_fewer(pair: Path, tmp_path: Path) -> None:
    train_elastic(tmp_path, ALONE, "alone")
    assert (pair / "shrunk.checkpoint-50.json").exists()
    train_elastic(pair, ALONE, "shrunk")
    one, losses = load_file(tmp_path / "alone.safetensors"), [row["loss"] for row in read_rows(tmp_path / "alone.jsonl")]
    for name in ("elastic", "shrunk", "grown"):
        weights = load_file(pair / f"{name}.safetensors")
        for key, value in one.items():
            torch.testing.assert_close(weights[key], value, rtol=0, atol=1e-5)
        assert [row["loss"] for row in read_rows(pair / f"{name}.jsonl")] == pytest.approx(losses, abs=1e-5)


def test_a_notice_that_one_rank_is_given_is_heeded_by_all(told: list[dict[str, Any]], pair: Path) -> None:
    (begun, again), other = (words["noticed"] for words in told)
    assert [begun, again] == other
    assert begun == 0
    assert 20 <= again <= 45
    assert (pair / "noticed.safetensors").read_bytes() == (pair / "stable.safetensors").read_bytes()
    losses = [[row["loss"] for row in read_rows(pair / f"{name}.jsonl")] for name in ("noticed", "stable")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6), "also of the half window"


def test_killed_ranks_go_on_to_the_same_bits(pair: Path) -> None:
    assert (pair / "killed.safetensors").read_bytes() == (pair / "stable.safetensors").read_bytes()
    assert (pair / "killed.jsonl").read_bytes() == (pair / "stable.jsonl").read_bytes()
    weights = [(pair / f"pretrain-{name}" / "backbone.safetensors").read_bytes() for name in ("killed", "plain")]
    assert weights[0] == weights[1]


def test_nothing_is_left_but_what_one_rank_would_leave(pair: Path) -> None:
    trained = {f"{name}.{kind}" for name in (*PRESETS, "killed", "elastic", "grown", "noticed") for kind in ("safetensors", "jsonl")} - {
        "bare.jsonl"
    }
    assert {path.name for path in pair.iterdir() if path.is_file()} >= trained
    assert not [path for path in pair.iterdir() if "checkpoint" in path.name and not path.name.startswith(("nan.", "shrunk."))]
    for name in ("plain", "rotated", "killed"):
        assert sorted(path.name for path in (pair / f"pretrain-{name}").iterdir()) == ["backbone.safetensors", "metrics.jsonl"]
        assert [row["val_accuracy"] for row in read_rows(pair / f"pretrain-{name}" / "metrics.jsonl")][-1] > 0


def test_pretraining_leaves_the_same_weights_on_every_rank(told: list[dict[str, Any]]) -> None:
    start = dict(Classifier(backbone := build_backbone("conv4", 0), feature_dim(backbone, SIZE), CLASSES, 0).named_parameters())
    for name in ("plain", "rotated", "killed"):
        for key, value in told[0][name].items():
            assert torch.equal(value, told[1][name][key]), f"{key} differs between the ranks"
            if name == "rotated" or "rotation" not in key:
                assert not torch.equal(value, start[key]), f"{key} never moved"


def test_all_ranks_see_that_one_has_diverged(told: list[dict[str, Any]]) -> None:
    assert [words["nan"] for words in told] == ["nan: the loss is nan at iteration 50; lower train.learning_rate"] * WORLD


def test_shares_are_equal_and_cover_the_batch() -> None:
    assert [list(range(12))[Ranks(rank, 3).share(12)] for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert ALONE.share(5) == slice(0, 5)
    with pytest.raises(UserError, match=r"train.batch_size=5: cannot be shared equally by 2 workers; set it to a multiple of 2, or .*ray"):
        Ranks(0, 2).share(5, "train.batch_size")


def test_elastic_shares_are_nearly_equal_and_their_weighted_means_are_the_batchs() -> None:
    for size, world in [(7, 2), (8, 3), (5, 5), (12, 4), (1, 1)]:
        ranks = [Ranks(rank, world, elastic=True) for rank in range(world)]
        values = torch.arange(size, dtype=torch.float64) ** 2
        shares = [values[rank.share(size)] for rank in ranks]
        assert torch.equal(torch.cat(shares), values)
        assert {len(share) for share in shares} <= {size // world, -(-size // world)}
        means = [rank.weight(size) * share.mean() for rank, share in zip(ranks, shares, strict=True)]
        assert float(torch.stack(means).mean()) == pytest.approx(float(values.mean()), rel=1e-12)
    assert [Ranks(rank, 3).weight(12) for rank in range(3)] == [1.0] * 3, "exactly"
    with pytest.raises(UserError, match=r"train.batch_size=2: leaves some of 3 workers without a part; set it to 3 or more, or lower ray"):
        Ranks(0, 3, elastic=True).share(2, "train.batch_size")
    with pytest.raises(UserError, match="cannot be shared equally"):
        Ranks(0, 2).weight(5)


def test_alone_nothing_is_wrapped_or_sent() -> None:
    module, tensor = torch.nn.Linear(1, 1), torch.ones(1)
    assert ALONE.first
    assert ALONE.wrap(module) is module
    assert ALONE.mean(tensor) is tensor
    assert ALONE.agree(3) == 3
    ALONE.barrier()
