"""Trainings in Ray Train's workers: data-parallel ranks, all started again when one is lost."""

import codecs
import json
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distributed.runtime import RayConfig, connect
from metadiff.artifact import write_atomically
from metadiff.errors import DISK_TROUBLE, UserError
from metadiff.machine import MachineConfig, set_up
from metadiff.parallel import ALONE, Ranks
from metadiff.pipeline import Run, say

Loop = Callable[..., None]

_COLLECTIVE_SECONDS = 3600  # ranks wait that long for rank 0's validation; a rank that died is noticed at once
_TAIL_SECONDS = 0.2
_PATIENCE_SECONDS = 120
_TRAIN_OPTIONS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # busy machines and new nodes take their time
}


def launch(loop: Loop, arguments: dict[str, Any], settings: RayConfig, folder: Path) -> None:
    """Run `loop(ranks, **arguments)` in `ray.num_workers` processes, or in this one for 0, and return when all are done.

    When one is lost, all start again, `ray.max_failures` times at most; `loop` is to resume from its own checkpoints. Those of Ray are
    not used: its storage is a folder of this attempt alone. What rank 0 writes to stderr appears on this process's.

    To be called in the main thread. After an interrupt the ranks end with the `runtime.session` around this.

    Args:
        loop: a function that can be pickled; leaves its results in files that all nodes share.
        arguments: small and picklable (paths rather than arrays).
        folder: for the time of the call, on a disk that all nodes share; emptied of what killed attempts left there.

    Raises:
        UserError: what a rank raised, as it was; so are errors of a full disk or of missing permissions.
        TrainingFailedError: Ray's, with a rank's traceback: it failed or was lost too often.
    """
    if settings.num_workers == 0:
        return loop(ALONE, **arguments)
    connect(settings)
    say(f"ray: starting {settings.num_workers} worker{'s' * (settings.num_workers > 1)}")
    with _attempt(folder) as attempt:
        trainer = _trainer(partial(_rank, loop, arguments, settings, attempt), settings, attempt.storage)
        error = _fit(trainer, attempt)
        if not error and not attempt.finished.exists():
            error = UserError(f"{folder}: Ray's workers do not see this folder; set run.dir to one that all nodes share")
    if error:
        raise error


def place(run: Run, ranks: Ranks) -> Run:
    """`run` as a rank sees it: on the device that the rank was given."""
    return replace(run, device=ranks.device or run.device)


class _Attempt:
    """The files by which a driver and its ranks know of each other.

    A newer driver removes them: ranks that outlived an older one (Ray's controller starts them again, if need be) find themselves unwanted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage, self.said = folder, folder / "ray", folder / "stderr"
        self.begun, self.finished, self._error = folder / "begun", folder / "finished", folder / "error.json"

    @property
    def wanted(self) -> bool:
        """Whether ranks are to work, rather than to end at once: not superseded, not failed for good."""
        return self.said.exists() and not self._error.exists()

    def fail(self, error: UserError | OSError) -> None:
        """Tell the driver what the user should know."""
        words = {"message": str(error)}
        if isinstance(error, OSError):
            words = {"errno": error.errno, "strerror": error.strerror, "filename": error.filename}
        write_atomically(self._error, json.dumps(words, default=os.fspath).encode())

    @property
    def failure(self) -> UserError | OSError | None:
        """What a rank told by `fail`."""
        if not self._error.exists():
            return None
        words = json.loads(self._error.read_text())
        return UserError(words["message"]) if "message" in words else OSError(words["errno"], words["strerror"], words["filename"])


@contextmanager
def _attempt(folder: Path) -> Iterator[_Attempt]:
    shutil.rmtree(folder, ignore_errors=True)
    attempt = _Attempt(folder / secrets.token_hex(4))
    attempt.storage.mkdir(parents=True)
    attempt.said.touch()
    try:
        yield attempt
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainer(rank: Callable[[], None], settings: RayConfig, storage: Path) -> Any:
    for name, value in _TRAIN_OPTIONS.items():
        os.environ.setdefault(name, value)
    if settings.address is None:
        # An actor less to start: this machine's end comes without notice.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})
    # Ranks that share a GPU are none of nccl's.
    backend = "nccl" if settings.gpus_per_worker >= 1 else "gloo"
    return TorchTrainer(
        rank,
        torch_config=TorchConfig(backend=backend, timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers, use_gpu=settings.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="train", storage_path=str(storage.absolute()), failure_config=FailureConfig(max_failures=settings.max_failures)
        ),
    )


def _fit(trainer: Any, attempt: _Attempt) -> BaseException | None:
    """Run the trainer, showing what rank 0 says; what went wrong, if anything."""
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    # In a thread of its own, where Ray leaves the handling of Ctrl-C alone.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    with attempt.said.open("rb") as said:
        over, impatient = False, time.monotonic() + _PATIENCE_SECONDS
        while not over:
            thread.join(_TAIL_SECONDS)
            over = bool(ended or attempt.failure)
            sys.stderr.write(decode(said.read()))
            sys.stderr.flush()
            if time.monotonic() > impatient and not attempt.begun.exists():
                say("ray: the workers have not started yet; waiting (does the cluster have the resources?)")
                impatient += 10 * _PATIENCE_SECONDS
    return attempt.failure or ended[0]


def _rank(loop: Loop, arguments: dict[str, Any], settings: RayConfig, attempt: _Attempt) -> None:
    """In a worker: one rank's part."""
    if not attempt.wanted:
        return
    import ray.train

    device = set_up(MachineConfig(device="cuda" if settings.gpus_per_worker else "cpu", num_threads=settings.cpus_per_worker))
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
    try:
        with _heard(attempt) if ranks.first else nullcontext():
            loop(ranks, **arguments)
        if ranks.first:
            attempt.finished.touch()
    except UserError as error:
        attempt.fail(error)
        raise
    except OSError as error:
        if error.errno in DISK_TROUBLE:
            attempt.fail(error)
        raise


@contextmanager
def _heard(attempt: _Attempt) -> Iterator[None]:
    with attempt.said.open("a", encoding="utf-8") as said, redirect_stderr(said):
        if attempt.begun.exists():
            say("\nray: a worker was lost; all start again from the newest checkpoint")
        attempt.begun.touch()
        yield
