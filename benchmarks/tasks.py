"""5-way 5-shot tasks on an imitation of mini-ImageNet features, in the shapes that training and sampling take."""

import numpy as np
import torch
from torch import Tensor

from benchmarks.imitation import imitation
from metadiff.bank_support import BankSupport
from metadiff.denoiser import Denoiser, DenoiserConfig, Preset, build_denoiser
from metadiff.episodes import EpisodeSampler
from metadiff.evaluation import TaskBlock, draw_tasks
from metadiff.learners import PrototypeLearner
from metadiff.schedule import Schedule

DIM, WAY, SHOT, QUERY, SEED = 512, 5, 5, 15, 0
LEARNER = PrototypeLearner()
_STD = 0.1
_UNSEEN = 0.3
"""Share of the classes that no denoiser is trained on."""


class Tasks:
    """Batches of training tasks on some classes, and blocks of unseen tasks on the others."""

    def __init__(self, classes: int = 64) -> None:
        features, offsets = imitation(classes, images=120)
        self.features = _STD * features
        seen = classes - max(WAY, round(classes * _UNSEEN))
        self.means = self.features.view(classes, -1, DIM).mean(1)
        self._seen = EpisodeSampler(offsets[: seen + 1], WAY, SHOT, QUERY, SEED, "base")
        self._unseen, self._first_unseen = EpisodeSampler(offsets[seen:] - offsets[seen], WAY, SHOT, QUERY, SEED, "val"), seen
        self._unseen_image = int(offsets[seen])

    def batch(self, step: int, size: int) -> tuple[Tensor, BankSupport]:
        """Class means w_0 (B, N, D) and support sets of one iteration's tasks."""
        drawn = self._seen.draw(np.arange(step * size, (step + 1) * size))
        return self.means[drawn.classes], BankSupport(self.features, torch.from_numpy(drawn.support))

    def block(self, ids: range) -> TaskBlock:
        """Tasks of unseen classes, with their queries and w_T."""
        features, means = self.features[self._unseen_image :], self.means[self._first_unseen :]
        return draw_tasks(self._unseen, features, means, np.array(ids), SEED)


def new_denoiser(preset: Preset, schedule: Schedule) -> Denoiser:
    """An untrained one."""
    return build_denoiser(DenoiserConfig(preset=preset), DIM, LEARNER, schedule, seed=SEED)
