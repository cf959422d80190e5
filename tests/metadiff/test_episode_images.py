import itertools

import numpy as np
import pytest
import torch

from metadiff import episode_images
from metadiff.episode_images import Drawn, EpisodePlan, MemoryEpisodes
from metadiff.episodes import EpisodeSampler, TaskSchedule
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, ImageSet, normalise
from metadiff.parallel import ALONE, Ranks

WAY, SHOT, BATCH = 3, 2, 4
SAMPLER, SCHEDULE = EpisodeSampler(np.arange(0, 31, 6), WAY, SHOT, 2, seed=7), TaskSchedule(10, 7)
AUGMENT = AugmentConfig(crop="shift", color_jitter=0.4)


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    return ImageSet(pixels, np.repeat(np.arange(5), 6), tuple("abcde"))


def plan(ranks: Ranks = ALONE) -> EpisodePlan:
    return EpisodePlan(SAMPLER, SCHEDULE, BATCH, ranks)


def steps(images: ImageSet, start: int, count: int, ranks: Ranks = ALONE, augment: AugmentConfig | None = None) -> list[torch.Tensor]:
    """The support images of some steps, put together from their pieces."""
    of = plan(ranks)
    pieces = MemoryEpisodes(images, of, augment, seed=5).pieces(start)
    return [torch.cat(list(itertools.islice(pieces, of.pieces_a_step))) for _ in range(count)]


def test_a_step_draws_the_support_of_its_episodes() -> None:
    drawn = plan().draw(2, 3)
    assert drawn.support.shape == (3, BATCH, WAY, SHOT)
    for step in range(3):
        episode_ids = np.arange(BATCH) + (2 + step) * BATCH
        assert drawn.episode_ids[step].tolist() == episode_ids.tolist()
        assert drawn.task_ids[step].tolist() == SCHEDULE.task_ids(episode_ids).tolist()
        np.testing.assert_array_equal(drawn.support[step], SAMPLER.draw(episode_ids, drawn.task_ids[step]).support)


def test_drawing_ahead_goes_on_without_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_images, "_EPISODES_AHEAD", 3 * BATCH + 1)
    blocks: list[Drawn] = list(itertools.islice(plan().ahead(5), 3))
    assert [block.start for block in blocks] == [5, 8, 11]
    whole = plan().draw(5, 9)
    np.testing.assert_array_equal(np.concatenate([block.support for block in blocks]), whole.support)
    np.testing.assert_array_equal(np.concatenate([block.task_ids for block in blocks]), whole.task_ids)


def test_a_step_larger_than_what_is_drawn_ahead_is_drawn_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episode_images, "_EPISODES_AHEAD", BATCH - 1)
    assert next(plan().ahead(0)).support.shape[0] == 1


def test_images_are_those_of_the_plan(images: ImageSet) -> None:
    drawn = plan().draw(2, 3)
    for of_step, expected in zip(steps(images, 2, 3), drawn.support, strict=True):
        assert torch.equal(of_step, normalise(torch.from_numpy(images.images[expected.ravel()]).permute(0, 3, 1, 2)))


@pytest.mark.parametrize("largest", [1, 5, 6, 23, 24, 512])
def test_images_do_not_depend_on_the_pieces(images: ImageSet, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = steps(images, 0, 3, augment=AUGMENT)
    monkeypatch.setattr(episode_images, "_PIECE", largest)
    pieces = plan().pieces_a_step
    assert plan().images_a_step % pieces == 0
    assert 24 / pieces <= largest
    assert all(torch.equal(ours, whole) for ours, whole in zip(steps(images, 0, 3, augment=AUGMENT), expected, strict=True))


@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_a_later_start_continues(images: ImageSet, augment: AugmentConfig | None) -> None:
    whole = steps(images, 0, 5, augment=augment)
    for batch, expected in zip(steps(images, 3, 2, augment=augment), whole[3:], strict=True):
        assert torch.equal(batch, expected)


def test_every_showing_is_augmented_anew(images: ImageSet) -> None:
    plain, rich = steps(images, 0, 10), steps(images, 0, 10, augment=AUGMENT)
    assert not any(torch.equal(one, other) for one, other in zip(plain, rich, strict=True))
    support = plan().draw(0, 10).support.ravel()
    first = {image: np.flatnonzero(support == image)[:2] for image in set(support.tolist())}
    shown = torch.cat(rich)
    assert not any(torch.equal(*shown[places]) for places in first.values() if len(places) == 2)


def test_every_task_is_visited_once_a_round() -> None:
    visited = plan().draw(0, 5).task_ids.ravel()
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))


@pytest.mark.parametrize("augment", [None, AUGMENT])
@pytest.mark.parametrize(("world", "elastic"), [(2, False), (4, False), (3, True)])
def test_ranks_share_a_step(images: ImageSet, world: int, elastic: bool, augment: AugmentConfig | None) -> None:
    every = [Ranks(rank, world, elastic=elastic) for rank in range(world)]
    whole, shares = steps(images, 5, 3, augment=augment), [steps(images, 5, 3, ranks, augment) for ranks in every]
    for step, expected in enumerate(whole):
        assert torch.equal(torch.cat([share[step] for share in shares]), expected)
    drawn = [plan(ranks).draw(5, 3) for ranks in every]
    np.testing.assert_array_equal(np.concatenate([part.task_ids for part in drawn], 1), plan().draw(5, 3).task_ids)


def test_a_batch_that_cannot_be_shared_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=4: cannot be shared equally by 3 workers.*ray\.num_workers"):
        plan(Ranks(0, 3))
