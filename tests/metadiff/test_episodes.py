"""Tasks and episodes: pure functions of (seed, number), uniform, and pinned."""

import pickle
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from metadiff.config import validate
from metadiff.episodes import EpisodeConfig, Episodes, EpisodeSampler, TaskSchedule
from metadiff.errors import UserError

OFFSETS = np.array([0, 20, 32, 60, 70, 100, 117])
IDS = np.arange(2000)


def sampler(way: int = 3, shot: int = 2, query: int = 3, seed: int = 7) -> EpisodeSampler:
    return EpisodeSampler(OFFSETS, way, shot, query, seed)


def images_of(episodes: Episodes) -> np.ndarray:
    return np.concatenate([episodes.support, episodes.query], axis=2)


def assert_same(one: Episodes, other: Episodes) -> None:
    for name in ("classes", "support", "query"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def assert_uniform(counts: np.ndarray) -> None:
    assert chisquare(counts).pvalue > 1e-3


def test_the_stream_never_changes() -> None:
    episodes = sampler().draw(np.array([0, 1, 10**9]))
    assert episodes.classes.tolist() == [[2, 3, 5], [5, 2, 1], [0, 5, 1]]
    assert episodes.support.tolist() == [[[58, 52], [67, 68], [116, 109]], [[101, 116], [33, 59], [21, 25]], [[1, 9], [116, 103], [20, 22]]]
    assert episodes.query[0].tolist() == [[56, 37, 42], [60, 66, 69], [101, 113, 107]]
    assert sampler().classes(np.arange(3, 6)).tolist() == [[3, 2, 4], [2, 4, 1], [1, 4, 2]]
    assert TaskSchedule(7, 7).task_ids(np.arange(14)).tolist() == [3, 6, 2, 4, 0, 5, 1, 5, 6, 0, 4, 2, 3, 1]


def test_an_episode_depends_on_nothing_but_its_number() -> None:
    together = sampler().draw(IDS)
    shuffled = np.random.default_rng(0).permutation(IDS)
    again = sampler().draw(shuffled)
    assert_same(Episodes(together.classes[shuffled], together.support[shuffled], together.query[shuffled]), again)
    for start, end in ((0, 1), (1, 8), (1020, 1030)):
        part = slice(start, end)
        assert_same(Episodes(together.classes[part], together.support[part], together.query[part]), sampler().draw(IDS[part]))


def test_no_episodes_are_no_episodes() -> None:
    assert sampler().draw(IDS[:0]).query.shape == (0, 3, 3)


def test_seeds_and_numbers_draw_differently() -> None:
    first, second = sampler(seed=0).draw(IDS), sampler(seed=1).draw(IDS)
    assert (first.classes == second.classes).all(1).mean() < 0.05
    assert len(np.unique(images_of(first).reshape(len(IDS), -1), axis=0)) == len(IDS)


def test_a_task_keeps_its_classes_and_gets_new_images() -> None:
    task_ids = np.full(50, 9)
    episodes = sampler().draw(np.arange(50), task_ids)
    np.testing.assert_array_equal(episodes.classes, sampler().classes(task_ids))
    assert len(np.unique(episodes.support.reshape(50, -1), axis=0)) > 45


def test_a_task_has_the_same_classes_for_every_shot() -> None:
    np.testing.assert_array_equal(sampler(shot=1).draw(IDS).classes, sampler(shot=4, query=2).draw(IDS).classes)


def test_classes_and_images_are_distinct_and_belong_together() -> None:
    episodes = sampler().draw(IDS)
    images = images_of(episodes)
    assert all(len(set(row)) == 3 for row in episodes.classes.tolist())
    assert (np.diff(np.sort(images.reshape(len(IDS), -1), axis=1), axis=1) > 0).all()
    assert (images >= OFFSETS[episodes.classes][..., None]).all()
    assert (images < OFFSETS[episodes.classes + 1][..., None]).all()


def test_a_class_may_be_used_up() -> None:
    episodes = EpisodeSampler(np.array([0, 4, 8]), 2, 1, 3, 0).draw(IDS[:20])
    assert (np.sort(images_of(episodes).reshape(20, -1), axis=1) == np.arange(8)).all()


def test_ways_come_in_every_order() -> None:
    everything = EpisodeSampler(OFFSETS[:4], 3, 1, 1, 0).classes(np.arange(1200))
    orders, counts = np.unique(everything, axis=0, return_counts=True)
    assert [tuple(order) for order in orders.tolist()] == sorted(permutations(range(3)))
    assert_uniform(counts)


def test_classes_are_uniform_in_every_way() -> None:
    classes = sampler().classes(np.arange(6000))
    for way in range(3):
        assert_uniform(np.bincount(classes[:, way], minlength=6))


@pytest.mark.parametrize("place", range(5))
def test_images_are_uniform_in_every_place(place: int) -> None:
    episodes = sampler().draw(np.arange(12_000))
    drawn = images_of(episodes)[..., place].ravel()
    for begin, end in pairwise(OFFSETS.tolist()):
        inside = drawn[(drawn >= begin) & (drawn < end)]
        assert_uniform(np.bincount(inside - begin, minlength=end - begin))


def test_support_and_query_are_drawn_jointly_uniformly() -> None:
    """Every ordered pair of different images of a class is as likely as any other."""
    images = images_of(EpisodeSampler(np.array([0, 5, 10]), 2, 1, 1, 3).draw(np.arange(4000))) % 5
    pairs = (images[..., 0] * 5 + images[..., 1]).ravel()
    counts = np.bincount(pairs, minlength=25).reshape(5, 5)
    assert np.trace(counts) == 0
    assert_uniform(counts[~np.eye(5, dtype=bool)])


def test_a_round_visits_every_task_once_and_the_next_in_another_order() -> None:
    rounds = TaskSchedule(100, 0).task_ids(np.arange(300)).reshape(3, 100)
    np.testing.assert_array_equal(np.sort(rounds, axis=1), np.tile(np.arange(100), (3, 1)))
    assert (rounds[0] == rounds[1]).mean() < 0.1
    assert (rounds[1] == rounds[2]).mean() < 0.1
    assert (TaskSchedule(100, 1).task_ids(np.arange(100)) == rounds[0]).mean() < 0.1


def test_a_visit_depends_on_nothing_but_its_number() -> None:
    schedule = TaskSchedule(100, 0)
    together = schedule.task_ids(np.arange(1000))
    shuffled = np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(schedule.task_ids(shuffled), together[shuffled])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(schedule)).task_ids(np.arange(95, 105)), together[95:105])


def test_more_ways_than_classes_are_refused() -> None:
    with pytest.raises(UserError, match=r"^episodes\.way=7: base has only 6 classes; .*$"):
        EpisodeSampler(OFFSETS, 7, 1, 1, 0, "base")


def test_more_images_than_a_class_has_are_refused() -> None:
    assert sampler(shot=5, query=5).draw(IDS[:1]).query.shape == (1, 3, 5)
    with pytest.raises(UserError, match=r"^episodes: 5 shots \+ 6 query images asked for, but a class of val has only 10 images; .*$"):
        EpisodeSampler(OFFSETS, 3, 5, 6, 0, "val")


@pytest.mark.parametrize("wrong", [{"shots": []}, {"shots": [1, 1]}, {"shots": [0]}, {"way": 1}, {"query": 0}])
def test_impossible_protocols_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        validate(EpisodeConfig, wrong, "here")
