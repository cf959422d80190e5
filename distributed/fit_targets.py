"""The stage `fit_targets`: Ray actors fit the target of every task, block by block, into the shared store."""

import math
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch

from distributed.config import EngineConfig
from distributed.fitting import Order, TargetsWorker
from distributed.progress import Progress
from distributed.runtime import work_through
from distributed.store import DamagedShards, TargetStore, compact
from metadiff import stages
from metadiff.learners import build_learner
from metadiff.pipeline import Run, resolved, say
from metadiff.scoring import TRANSFORM
from metadiff.stages import fix_transform, say_unconverged
from metadiff.targets import SUMMARY, check_targets, summarise

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
    order = _order(run, folder)
    num_blocks = math.ceil(settings.targets.num_tasks / settings.store.block)
    progress = Progress(summary_file(run), order, order.store.missing(num_blocks))
    with progress.recorded():
        _fit_blocks(settings, order, sorted(progress.missing), progress)
        for repairs_left in reversed(range(_REPAIRS + 1)):
            try:
                compact(order.store, num_blocks, folder)
                break
            except DamagedShards as damage:
                if not repairs_left:
                    raise
                say(f"fit_targets: {damage}")
                progress.undo(damage.blocks)
                _fit_blocks(settings, replace(order, repairing=True), damage.blocks, progress)
    say_unconverged(summarise(folder, build_learner(settings.learner), settings.targets))


def _fit_blocks(settings: EngineConfig, order: Order, blocks: Sequence[int], progress: Progress) -> None:
    # Drivers that share a store begin at different places, and meet only when little is left.
    first = secrets.randbelow(len(blocks)) if blocks and settings.store.url else 0
    for block, is_ours in work_through(TargetsWorker, (order,), [*blocks[first:], *blocks[:first]], settings.ray, watch=progress.watch):
        progress.done(block, is_ours)


def _order(run: Run, folder: Path) -> Order:
    settings = cast(EngineConfig, run.config)
    store = open_store(run, folder)
    if "fit_targets" in run.forced:
        store = open_store(run, folder, fresh=True)
    return Order(
        bank=run.artifacts["embed"],
        transform=folder / TRANSFORM,
        store=store,
        targets=settings.targets,
        learner=settings.learner,
        block=settings.store.block,
        way=settings.episodes.way,
        seed=settings.seed,
        device=_device(run),
    )


def open_store(run: Run, folder: Path, fresh: bool = False) -> TargetStore:
    """The run's store: where the configuration says, or in the stage's own folder until the targets are one array.

    Sums depend on the number of threads and on the device, so that these identify a store as well.
    """
    settings = cast(EngineConfig, run.config)
    identity = {
        "config": resolved(settings, STAGE),
        "features": run.artifacts["embed"].content,
        "threads": settings.ray.cpus_per_worker if settings.ray.num_actors else torch.get_num_threads(),
        "device": _device(run),
    }
    return TargetStore.open(settings.store.url or folder / _STORE, identity, settings.store.endpoint_url, fresh)


def summary_file(run: Run) -> Path:
    """The record of the last fit: beside the artifact, whose content does not depend on how long it took."""
    return run.folder / "fit_targets" / f"{run.variant}.summary.json"


def _device(run: Run) -> Literal["cpu", "cuda"]:
    ray = cast(EngineConfig, run.config).ray
    on_gpu = ray.gpus_per_worker > 0 if ray.num_actors else run.device.type == "cuda"
    return "cuda" if on_gpu else "cpu"


_IN_PROCESS = stages.STAGES["fit_targets"]
STAGE = replace(_IN_PROCESS, build=build, sections=(*_IN_PROCESS.sections, "store.block"))

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="fit_targets"))
