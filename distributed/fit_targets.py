"""The stage `fit_targets`: Ray actors fit the target of every task, block by block, into the shared store."""

import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distributed.config import EngineConfig, here
from distributed.runtime import work_through
from distributed.store import DamagedShards, TargetStore, compact
from metadiff import stages
from metadiff.features import FeatureBank
from metadiff.learners import build_learner
from metadiff.pipeline import Run, resolved, say
from metadiff.scoring import TRANSFORM, open_transform
from metadiff.stages import fix_transform, say_unconverged, task_sampler
from metadiff.targets import DIAGNOSTICS, SUMMARY, FittedTargets, check_targets, class_means, fit_targets, summarise

_REPAIRS = 3
_STORE = "store"


def build(run: Run, folder: Path) -> None:
    """Fit the blocks that the store does not have yet, then make one memory-mappable array of them."""
    if not (folder / SUMMARY).exists():
        _fit(run, folder)
    shutil.rmtree(folder / _STORE, ignore_errors=True)


def _fit(run: Run, folder: Path) -> None:
    settings = cast(EngineConfig, run.config)
    check_targets(settings.targets, build_learner(settings.learner))
    fix_transform(run, folder)
    store = open_store(run, folder)
    if "fit_targets" in run.forced:
        store = open_store(run, folder, fresh=True)
    num_blocks = math.ceil(settings.targets.num_tasks / settings.store.block)
    _fit_blocks(run, folder, store.missing(num_blocks))
    for repairs_left in reversed(range(_REPAIRS + 1)):
        try:
            compact(store, num_blocks, folder)
            break
        except DamagedShards as damage:
            if not repairs_left:
                raise
            say(f"fit_targets: {damage}")
            _fit_blocks(run, folder, damage.blocks)
    say_unconverged(summarise(folder, build_learner(settings.learner), settings.targets))


def _fit_blocks(run: Run, folder: Path, blocks: Sequence[int]) -> None:
    settings = cast(EngineConfig, run.config)
    total, left = settings.targets.num_tasks, sum(len(_tasks(settings, block)) for block in blocks)
    with tqdm(total=total, initial=total - left, desc="fit targets", unit="task", mininterval=1.0) as progress:
        for block, _ in work_through(TargetsWorker, (run, folder), blocks, settings.ray):
            progress.update(len(_tasks(settings, block)))


def open_store(run: Run, folder: Path, fresh: bool = False) -> TargetStore:
    """The run's store: where the configuration says, or in the stage's own folder until the targets are one array."""
    settings = cast(EngineConfig, run.config)
    identity = {"config": resolved(settings, STAGE), "features": run.artifacts["embed"].content}
    return TargetStore.open(settings.store.url or folder / _STORE, identity, settings.store.endpoint_url, fresh)


class TargetsWorker:
    """An actor with the base classes' features."""

    def __init__(self, run: Run, folder: Path) -> None:
        run = here(run)
        self._settings = cast(EngineConfig, run.config)
        bank = FeatureBank.open(run.artifacts["embed"], "base")
        self._features, self._offsets = open_transform(folder / TRANSFORM)(bank.features).to(run.device), bank.offsets
        self._sampler, self._learner = task_sampler(run, bank), build_learner(self._settings.learner)
        self._store = open_store(run, folder)

    def run(self, block: int) -> None:
        """Fit the block and commit it to the store."""
        tasks = _tasks(self._settings, block)
        classes = self._sampler.classes(np.array(tasks))
        self._store.commit(block, {"classes": torch.from_numpy(classes), **self._fit(classes, tasks.start)}, tasks.start, tasks.stop - 1)

    def _fit(self, classes: np.ndarray, first_task: int) -> dict[str, Tensor]:
        targets = self._settings.targets
        dtype = {"fp16": torch.float16, "fp32": torch.float32}[targets.dtype]
        if targets.kind == "mean":
            return {"targets": self._means[torch.from_numpy(classes)].cpu().to(dtype)}
        starts = range(0, len(classes), targets.block)
        fits = [self._fit_together(classes[start : start + targets.block], first_task + start) for start in starts]
        diagnostics = {name: torch.cat([getattr(fit, name) for fit in fits]).cpu() for name, _ in DIAGNOSTICS}
        return {"targets": torch.cat([fit.w for fit in fits]).cpu().to(dtype), **diagnostics}

    def _fit_together(self, classes: np.ndarray, first_task: int) -> FittedTargets:
        return fit_targets(self._features, self._offsets, classes, self._learner, self._settings.targets, first_task)

    @cached_property
    def _means(self) -> Tensor:
        return class_means(self._features, self._offsets)


def _tasks(settings: EngineConfig, block: int) -> range:
    """The ids of a block's tasks."""
    return range(block * settings.store.block, min((block + 1) * settings.store.block, settings.targets.num_tasks))


_IN_PROCESS = stages.STAGES["fit_targets"]
STAGE = replace(_IN_PROCESS, build=build, sections=(*_IN_PROCESS.sections, "store.block"))

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="fit_targets"))
