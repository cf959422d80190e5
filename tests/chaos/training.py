"""A training in as many of a cluster's workers as there is room for, whose pace a file sets."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from torch import Tensor

from distributed.resources import RayConfig
from distributed.runtime import session
from distributed.workers import launch
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.learners import PrototypeLearner, Support
from metadiff.optimisation import TrainConfig
from metadiff.parallel import Ranks
from metadiff.schedule import Schedule
from metadiff.training import train
from tests.chaos.commands import descendants
from tests.tasks import DIM, batches

# A batch that neither two nor three can share equally.
SETTINGS = TrainConfig(iterations=6000, batch_size=7, ema_decay=0.9, ema_start=20, checkpoint_every=6000)
PROGRAM = ("-c", "from tests.chaos.training import drive; drive()")
FEWEST, MOST = 1, 3
_SLOW_SECONDS = 0.1


def loop(ranks: Ranks, folder: Path) -> None:
    """Train a denoiser to `folder`/d; slowly while there is `folder`/slow. No checkpoint is due before the end."""

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        for batch in batches(ranks, SETTINGS.batch_size, start):
            time.sleep(_SLOW_SECONDS * (folder / "slow").exists())
            yield batch

    schedule = Schedule()
    denoiser = build_denoiser(DenoiserConfig(), DIM, PrototypeLearner(), schedule)
    train(denoiser, schedule, source, SETTINGS, 0, folder / "d", "train", ranks=ranks)


def drive() -> None:
    """The command: `address folder`."""
    settings = RayConfig(address=sys.argv[1], num_workers=(FEWEST, MOST), num_actors=0)
    folder = Path(sys.argv[2])
    with session():
        launch(loop, {"folder": folder}, settings, folder / "ray", elastic=True)


def ranks_under(ancestors: list[int]) -> list[psutil.Process]:
    """Ray Train's workers among the processes below these."""
    found = []
    for process in descendants(ancestors):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def steps(folder: Path) -> list[int]:
    """Those of the checkpoints in a folder, the newest last."""
    return sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("*.checkpoint-*.json"))
