"""Which episodes training visits, step by step, and their support images: what to train on where no bank of features will do."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from metadiff.episodes import EpisodeSampler, TaskSchedule
from metadiff.images import AugmentConfig, ImageSet, augmentation, normalise, transformed
from metadiff.parallel import ALONE, Ranks

_EPISODES_AHEAD = 4096
"""Drawn in one call: a call costs as much as drawing a hundred."""
_PIECE = 512
"""Images that are decoded, and go through a backbone, at once at most."""


@dataclass(frozen=True)
class Drawn:
    """The episodes of M consecutive steps of one rank.

    Attributes:
        start: the first step.
        episode_ids: (M, E).
        task_ids: (M, E) the task of each.
        support: (M, E, N, K) images of the split.
    """

    start: int
    episode_ids: np.ndarray
    task_ids: np.ndarray
    support: np.ndarray


class EpisodePlan:
    """Which episodes each step visits: a pure function of the sampler's and the schedule's seeds and the global step.

    Args:
        sampler: draws each episode's images.
        schedule: says which task each episode visits.
        batch_size: episodes in one step, of all ranks together.
        ranks: this process takes its share of every step.

    Raises:
        UserError: the ranks cannot share the batch.
    """

    def __init__(self, sampler: EpisodeSampler, schedule: TaskSchedule, batch_size: int, ranks: Ranks = ALONE) -> None:
        self.sampler, self.schedule, self.batch_size = sampler, schedule, batch_size
        self.share = ranks.share(batch_size, "train.batch_size")

    @property
    def episodes_a_step(self) -> int:
        """E episodes in a step of this rank."""
        return self.share.stop - self.share.start

    @property
    def images_a_step(self) -> int:
        """E N K support images in a step of this rank."""
        return self.episodes_a_step * self.sampler.way * self.sampler.shot

    @property
    def pieces_a_step(self) -> int:
        """How many equal pieces of at most 512 images a step's support images come in."""
        images = self.images_a_step
        return next(pieces for pieces in range(-(-images // _PIECE), images + 1) if images % pieces == 0)

    def draw(self, start: int, num_steps: int) -> Drawn:
        """This rank's episodes of the global steps `start` .. `start + num_steps - 1`."""
        every = np.arange(start * self.batch_size, (start + num_steps) * self.batch_size)
        episode_ids = every.reshape(num_steps, -1)[:, self.share]
        task_ids = self.schedule.task_ids(episode_ids.ravel())
        support = self.sampler.support(episode_ids.ravel(), task_ids)
        return Drawn(start, episode_ids, task_ids.reshape(episode_ids.shape), support.reshape(*episode_ids.shape, *support.shape[1:]))

    def ahead(self, start: int) -> Iterator[Drawn]:
        """The same without end from the global step `start` on, many steps at once."""
        num_steps = max(1, _EPISODES_AHEAD // self.episodes_a_step)
        while True:
            yield self.draw(start, num_steps)
            start += num_steps


class EpisodeImages(Protocol):
    """What training needs of a plan's images."""

    def pieces(self, start: int) -> Generator[torch.Tensor, None, None]:
        """Without end from the global step `start` on, the steps' support images (P, 3, H, H), normalised float32, channels last in memory.

        They come episode by episode, in each class by class, in `EpisodePlan.pieces_a_step` equal pieces a step. Each is a pure function
        of the step and of the image's place in the batch of all ranks.
        """
        ...


class MemoryEpisodes:
    """A plan's support images, from arrays in memory.

    Args:
        augment: how to augment the images; None leaves them as they are.
        seed: with an episode's number, all there is to the augmentation's randomness.
    """

    def __init__(self, images: ImageSet, plan: EpisodePlan, augment: AugmentConfig | None = None, seed: int = 0) -> None:
        self.images, self.plan, self.seed = images, plan, seed
        self.transform = augmentation(augment, images.images.shape[1]) if augment else None

    def pieces(self, start: int) -> Generator[torch.Tensor, None, None]:
        """The images of `EpisodeImages`."""
        size = self.plan.images_a_step // self.plan.pieces_a_step
        for drawn in self.plan.ahead(start):
            for episode_ids, support in zip(drawn.episode_ids, drawn.support, strict=True):
                yield from map(normalise, self._pixels(episode_ids, support).split(size))

    def _pixels(self, episode_ids: np.ndarray, support: np.ndarray) -> torch.Tensor:
        # Episode by episode, because the transforms of an episode's images draw from one stream, one after the other.
        parts = [
            transformed(self.images.images[images.ravel()], self.transform, [self.seed, episode])
            for episode, images in zip(episode_ids.tolist(), support, strict=True)
        ]
        return torch.cat(parts)
