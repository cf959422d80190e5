"""Tasks and episodes, each a pure function of (seed, number): the same on every machine, worker and library version."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator

from metadiff.config import config
from metadiff.errors import UserError

_CHUNK = 1024
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 divided by the golden ratio: the step of SplitMix64."""
_FEW = 8
"""Draws up to which remembering the swaps is faster than shuffling a deck."""


@config
class EpisodeConfig:
    """The N-way K-shot protocol that targets, training and evaluation share."""

    way: Annotated[int, Field(ge=2)] = 5
    shots: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5)
    """One denoiser is trained, and one set of rows reported, for each."""
    query: Annotated[int, Field(ge=1)] = 15
    """Query images a class."""

    @field_validator("shots")
    @classmethod
    def _some_distinct_shots(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if not shots or len(set(shots)) != len(shots):
            raise ValueError("give one or more different shots, for example [1, 5]")
        return shots


@dataclass(frozen=True)
class Episodes:
    """B episodes as indices into a split's images.

    Attributes:
        classes: (B, N) the class of each way, in the task's order.
        support: (B, N, K).
        query: (B, N, Q), disjoint from the support.
    """

    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


class EpisodeSampler:
    """Draws tasks and episodes from a split whose images are sorted by class.

    Args:
        offsets: (C + 1,) where each class's images begin; the last entry is their number.
        way, shot, query: N, K and Q.
        seed: with a task's or an episode's number, all there is to its randomness.

    Raises:
        UserError: more ways than classes, or a class with fewer than K + Q images.
    """

    def __init__(self, offsets: np.ndarray, way: int, shot: int, query: int, seed: int, split: str = "the split") -> None:
        self.offsets, self.sizes = offsets[:-1], np.diff(offsets)
        self.way, self.shot, self.query, self.seed = way, shot, query, seed
        if way > len(self.sizes):
            raise UserError(f"episodes.way={way}: {split} has only {len(self.sizes)} classes; lower it or take a split with more")
        if shot + query > self.sizes.min():
            raise UserError(
                f"episodes: {shot} shots + {query} query images asked for, but a class of {split} has only {self.sizes.min()} images; "
                "lower episodes.shots or episodes.query"
            )

    def classes(self, task_ids: np.ndarray) -> np.ndarray:
        """(B,) task ids to (B, N) distinct classes, in order."""
        keys = random_keys(self.seed, "class", task_ids, self.way)
        return _deal(keys, np.full(len(keys), len(self.sizes)))

    def draw(self, episode_ids: np.ndarray, task_ids: np.ndarray | None = None) -> Episodes:
        """Episodes by number: a task's classes with the images that the episode's own number draws.

        Args:
            episode_ids: (B,) non-negative.
            task_ids: (B,) whose classes to take; an episode's own number where None.
        """
        classes = self.classes(episode_ids if task_ids is None else task_ids)
        images = self._images(episode_ids, classes, self.shot + self.query)
        return Episodes(classes, images[..., : self.shot], images[..., self.shot :])

    def support(self, episode_ids: np.ndarray, task_ids: np.ndarray) -> np.ndarray:
        """(B, N, K): the support images of `draw`, without drawing the queries."""
        return self._images(episode_ids, self.classes(task_ids), self.shot)

    def _images(self, episode_ids: np.ndarray, classes: np.ndarray, count: int) -> np.ndarray:
        """The first `count` of the K + Q images that each episode draws from each of its classes (B, N)."""
        places = np.arange(self.way)[:, None] * (self.shot + self.query) + np.arange(count)
        keys = random_keys(self.seed, "image", episode_ids, places.ravel()).reshape(-1, count)
        dealt = _deal(keys, self.sizes[classes].ravel()).reshape(*classes.shape, count)
        return dealt + self.offsets[classes][..., None]


@dataclass(frozen=True)
class TaskSchedule:
    """Which task each training episode visits: one seeded permutation of all task ids after another."""

    num_tasks: int
    seed: int

    def task_ids(self, episode_ids: np.ndarray) -> np.ndarray:
        """(B,) episode numbers to (B,) task ids."""
        rounds, places = np.divmod(episode_ids, self.num_tasks)
        task_ids = np.empty_like(places)
        for visit in np.unique(rounds).tolist():
            now = rounds == visit
            task_ids[now] = _permutation(self.num_tasks, self.seed, visit)[places[now]]
        return task_ids


@lru_cache(maxsize=2)
def _permutation(num_tasks: int, seed: int, visit: int) -> np.ndarray:
    return np.argsort(random_keys(seed, "visit", np.array([visit]), num_tasks)[0], kind="stable")


def _deal(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(R, need) random keys to `need` distinct numbers below each row's size (R,), in random order: the start of a Fisher-Yates shuffle."""
    dealt = np.empty(keys.shape, np.int64)
    deal = _deal_few if keys.shape[1] <= _FEW else _deal_chunk
    for start in range(0, len(keys), _CHUNK):
        rows = slice(start, start + _CHUNK)
        dealt[rows] = deal(keys[rows], sizes[rows])
    return dealt


def _deal_few(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The same without a deck: a place that no swap has touched holds its own number."""
    picks: list[np.ndarray] = []
    moved: list[np.ndarray] = []
    dealt = np.empty(keys.shape, np.int64)
    for place in range(keys.shape[1]):
        pick = place + (keys[:, place] % (sizes - place).astype(np.uint64)).astype(np.int64)
        drawn, here = pick.copy(), np.full(len(keys), place)
        for earlier, held in zip(picks, moved, strict=True):  # the last swap counts
            np.copyto(drawn, held, where=earlier == pick)
            np.copyto(here, held, where=earlier == place)
        picks.append(pick)
        moved.append(here)
        dealt[:, place] = drawn
    return dealt


def _deal_chunk(keys: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    row, need = np.arange(len(keys)), keys.shape[1]
    deck = np.tile(np.arange(sizes.max(), dtype=np.int32), (len(keys), 1))
    for place in range(need):
        # The remainder favours small numbers by less than size / 2^64.
        pick = place + (keys[:, place] % (sizes - place).astype(np.uint64)).astype(np.int64)
        drawn = deck[row, pick]
        deck[row, pick] = deck[:, place]
        deck[:, place] = drawn
    return deck[:, :need]


def random_keys(seed: int, purpose: str, numbers: np.ndarray, places: int | np.ndarray) -> np.ndarray:
    """(B, P) 64-bit keys, hashed from (seed, purpose, number, place): of these places, or of the first so many."""
    stream = _mix(np.uint64(seed) + np.uint64(int.from_bytes(purpose.encode(), "little")))
    rows = _mix(numbers.astype(np.uint64) ^ stream)
    return _mix(rows[:, None] + np.asarray(np.arange(places) if isinstance(places, int) else places, np.uint64) * _GOLDEN)


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that scrambles every bit."""
    with np.errstate(over="ignore"):
        x = np.asarray(x, np.uint64) + _GOLDEN
        x ^= x >> np.uint64(30)
        x *= np.uint64(0xBF58476D1CE4E5B9)
        x ^= x >> np.uint64(27)
        x *= np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
        return x
