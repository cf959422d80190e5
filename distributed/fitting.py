"""An actor of the stage `fit_targets`. Apart from the stage, which imports far more: an actor should start fast."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distributed.store import DamagedShards, TargetStore
from metadiff.artifact import Artifact
from metadiff.checkpoint import load_state
from metadiff.episodes import EpisodeSampler
from metadiff.features import FeatureBank, FeatureTransform
from metadiff.learners import LearnerConfig, build_learner
from metadiff.machine import MachineConfig, set_up
from metadiff.targets import DIAGNOSTICS, DTYPES, TargetsConfig, TargetSolver, class_means


@dataclass(frozen=True)
class Order:
    """What all actors of a fit have in common: small, and picklable.

    Attributes:
        bank: the `embed` artifact.
        transform: the file of the features' transform.
        store: where the targets go.
        block: tasks in a block.
        way: classes in a task.
        seed: of the tasks.
        device: where to fit.
        repairing: whether shards that seem whole are verified to the last bit before they are left as they are.
    """

    bank: Artifact
    transform: Path
    store: TargetStore
    targets: TargetsConfig
    learner: LearnerConfig
    block: int
    way: int
    seed: int
    device: Literal["cpu", "cuda"]
    repairing: bool = False

    def tasks(self, block: int) -> range:
        """The ids of a block's tasks."""
        return range(block * self.block, min((block + 1) * self.block, self.targets.num_tasks))


class TargetsWorker:
    """An actor with the base classes' features, which it keeps in memory."""

    def __init__(self, order: Order) -> None:
        bank, transform = FeatureBank.open(order.bank, "base"), FeatureTransform(**load_state(order.transform))
        features = transform(bank.features).to(set_up(MachineConfig(device=order.device)))
        self._order, self._sampler = order, EpisodeSampler(bank.offsets, order.way, 1, 1, order.seed, "base")
        # One copy of the features in either case: the solver has its own.
        if order.targets.kind == "mean":
            self._means = class_means(features, bank.offsets)
        else:
            self._solver = TargetSolver(features, bank.offsets, build_learner(order.learner), order.targets)

    def run(self, block: int) -> bool:
        """Fit the block and commit it to the store; False if another was first."""
        if self._is_there(block):
            return False
        tasks = self._order.tasks(block)
        classes = self._sampler.classes(np.array(tasks))
        tensors = {"classes": torch.from_numpy(classes), **self._fit(classes, tasks.start)}
        return self._order.store.commit(block, tensors, tasks.start, tasks.stop - 1)

    def _is_there(self, block: int) -> bool:
        if not self._order.repairing:
            return self._order.store.has(block)
        try:
            self._order.store.read(block)
        except DamagedShards:
            return False
        return True

    def _fit(self, classes: np.ndarray, first_task: int) -> Mapping[str, Tensor]:
        targets = self._order.targets
        dtype = torch.from_numpy(np.empty(0, DTYPES[targets.dtype])).dtype
        if targets.kind == "mean":
            return {"targets": self._means[torch.from_numpy(classes)].cpu().to(dtype)}
        fitted = self._solver.fit(classes, first_task)
        diagnostics = {name: getattr(fitted, name).cpu() for name, _ in DIAGNOSTICS}
        return {"targets": fitted.w.cpu().to(dtype), **diagnostics}
