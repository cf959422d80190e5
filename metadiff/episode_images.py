"""The support images of training episodes, step by step: what to train on when there is no bank of features."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from metadiff.episodes import Episodes, EpisodeSampler, TaskSchedule
from metadiff.images import ImageSet, batches_in_order
from metadiff.parallel import ALONE, Ranks


@dataclass(frozen=True)
class EpisodeBatch:
    """One step's episodes of one rank.

    Attributes:
        images: (E N K, 3, H, H) normalised float32: episode by episode, in each class by class.
        task_ids: (E,) the task of each.
        classes: (E, N) the class of each way.
    """

    images: torch.Tensor
    task_ids: np.ndarray
    classes: np.ndarray


class EpisodePlan:
    """Which episodes each step visits: a pure function of the sampler's and the schedule's seeds and the global step.

    Args:
        sampler: draws each episode's images.
        schedule: says which task each episode visits.
        batch_size: episodes in one step, of all ranks together.
        ranks: this process takes its share of every step.

    Raises:
        UserError: the ranks cannot share the batch equally.
    """

    def __init__(self, sampler: EpisodeSampler, schedule: TaskSchedule, batch_size: int, ranks: Ranks = ALONE) -> None:
        self.sampler, self.schedule, self.batch_size = sampler, schedule, batch_size
        self.share = ranks.share(batch_size, "train.batch_size")

    @property
    def images_a_step(self) -> int:
        """E N K support images in a step of this rank."""
        return (self.share.stop - self.share.start) * self.sampler.way * self.sampler.shot

    def episodes(self, start: int, num_steps: int) -> tuple[np.ndarray, Episodes]:
        """The (num_steps E,) task ids and the episodes of this rank from the global step `start` on, step after step."""
        episode_ids = (
            np.arange(start * self.batch_size, (start + num_steps) * self.batch_size).reshape(num_steps, -1)[:, self.share].ravel()
        )
        task_ids = self.schedule.task_ids(episode_ids)
        return task_ids, self.sampler.draw(episode_ids, task_ids)


class MemoryEpisodes:
    """A plan's support images, from arrays in memory."""

    def __init__(self, images: ImageSet, plan: EpisodePlan) -> None:
        self.images, self.plan = images, plan

    def steps(self, start: int) -> Iterator[EpisodeBatch]:
        """Batches without end from the global step `start` on."""
        while True:
            task_ids, episodes = self.plan.episodes(start, 1)
            (images,) = batches_in_order(self.images.images[episodes.support.ravel()], episodes.support.size)
            yield EpisodeBatch(images, task_ids, episodes.classes)
            start += 1
