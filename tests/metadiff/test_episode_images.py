import itertools

import numpy as np
import pytest
import torch

from metadiff.episode_images import EpisodeBatch, EpisodePlan, MemoryEpisodes
from metadiff.episodes import EpisodeSampler, TaskSchedule
from metadiff.errors import UserError
from metadiff.images import ImageSet, normalise
from metadiff.parallel import ALONE, Ranks

WAY, SHOT, BATCH = 3, 2, 4
SAMPLER, SCHEDULE = EpisodeSampler(np.arange(0, 31, 6), WAY, SHOT, 2, seed=7), TaskSchedule(10, 7)


@pytest.fixture
def images() -> ImageSet:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    return ImageSet(pixels, np.repeat(np.arange(5), 6), tuple("abcde"))


def steps(images: ImageSet, start: int, count: int, ranks: Ranks = ALONE) -> list[EpisodeBatch]:
    return list(itertools.islice(MemoryEpisodes(images, EpisodePlan(SAMPLER, SCHEDULE, BATCH, ranks)).steps(start), count))


def test_a_step_holds_the_support_of_its_episodes(images: ImageSet) -> None:
    for step, batch in enumerate(steps(images, 2, 3), 2):
        episode_ids = np.arange(BATCH) + step * BATCH
        assert batch.task_ids.tolist() == SCHEDULE.task_ids(episode_ids).tolist()
        episodes = SAMPLER.draw(episode_ids, batch.task_ids)
        assert batch.images.shape == (BATCH * WAY * SHOT, 3, 8, 8)
        assert torch.equal(batch.images, normalise(torch.from_numpy(images.images[episodes.support.ravel()]).permute(0, 3, 1, 2)))
        np.testing.assert_array_equal(batch.classes, SAMPLER.classes(batch.task_ids))
        assert (images.labels[episodes.support] == batch.classes[..., None]).all()


def test_a_later_start_continues(images: ImageSet) -> None:
    for batch, expected in zip(steps(images, 3, 2), steps(images, 0, 5)[3:], strict=True):
        assert torch.equal(batch.images, expected.images)


def test_every_task_is_visited_once_a_round(images: ImageSet) -> None:
    visited = np.concatenate([batch.task_ids for batch in steps(images, 0, 5)])
    assert sorted(visited[:10]) == sorted(visited[10:]) == list(range(10))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_step(images: ImageSet, world: int) -> None:
    whole, shares = steps(images, 5, 3), [steps(images, 5, 3, Ranks(rank, world)) for rank in range(world)]
    for step, expected in enumerate(whole):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        np.testing.assert_array_equal(np.concatenate([part.task_ids for part in parts]), expected.task_ids)
        np.testing.assert_array_equal(np.concatenate([part.classes for part in parts]), expected.classes)


def test_a_batch_that_cannot_be_shared_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size=4: cannot be shared equally by 3 workers.*ray\.num_workers"):
        EpisodePlan(SAMPLER, SCHEDULE, BATCH, Ranks(0, 3))
