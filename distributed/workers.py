"""Trainings in Ray Train's workers: data-parallel ranks, all started again when one is lost."""

import codecs
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distributed.attempts import Attempt, begin
from distributed.guardian import environment
from distributed.notices import Notices
from distributed.resources import RayConfig
from distributed.runtime import connect
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
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
# With any number of workers: how long to wait for the room of a node that may have gone meanwhile, before asking what there is.
_ELASTIC_OPTIONS = _TRAIN_OPTIONS | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
_RESIZE_SECONDS = 10.0  # how often to ask whether the cluster has room for more


def launch(loop: Loop, arguments: dict[str, Any], settings: RayConfig, folder: Path, *, elastic: bool = False) -> None:
    """Run `loop(ranks, **arguments)` in `ray.num_workers` processes, or in this one for 0, and return when all are done.

    When one is lost, all start again, `ray.max_failures` times at most; `loop` is to resume from its own checkpoints. Those of Ray are
    not used: its storage is a folder of this attempt alone. What rank 0 writes to stderr appears on this process's.

    Of [fewest, most] workers, there are as many as the cluster has room for: all start again when that changes. Where a node is about to
    be taken away, `Ranks.notice` tells, and it counts as no failure.

    To be called in the main thread. After an interrupt the ranks end with the `runtime.session` around this.

    Args:
        loop: a function that can be pickled; leaves its results in files that all nodes share.
        arguments: small and picklable (paths rather than arrays).
        folder: for the time of the call, on a disk that all nodes share; emptied of what killed attempts left there.
        elastic: whether `loop` can go on with another number of ranks; otherwise it is the fewest throughout.

    Raises:
        UserError: what a rank raised, as it was; so are errors of a full disk or of missing permissions.
        TrainingFailedError: Ray's, with a rank's traceback: it failed or was lost too often.
    """
    if not settings.workers[0]:
        return loop(ALONE, **arguments)
    if not elastic:
        settings = replace(settings, num_workers=settings.workers[0])
    connect(settings)
    say(f"ray: starting {_in_words(settings)}")
    with begin(folder) as attempt, environment(**_options(settings)):
        trainer = _trainer(partial(_rank, loop, arguments, settings, attempt), settings, attempt.storage)
        attempt.claim(trainer.train_run_context.run_id)
        error = _fit(trainer, attempt)
        if not error and not attempt.finished.exists():
            error = UserError(f"{folder}: Ray's workers do not see this folder; set run.dir to one that all nodes share")
    if error:
        raise error


def place(run: Run, ranks: Ranks) -> Run:
    """`run` as a rank sees it: on the device that the rank was given."""
    return replace(run, device=ranks.device or run.device)


def _in_words(settings: RayConfig) -> str:
    fewest, most = settings.workers
    return f"{fewest} to {most} workers, as there is room" if fewest < most else _counted(fewest)


def _counted(number: int) -> str:
    return f"{number} worker{'s' * (number > 1)}"


def _options(settings: RayConfig) -> dict[str, str]:
    fewest, most = settings.workers
    options = _ELASTIC_OPTIONS if fewest < most else _TRAIN_OPTIONS
    # On this machine alone, whose end comes without notice, an actor less to start.
    return options | ({} if settings.address else {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"})


def _trainer(rank: Callable[[], None], settings: RayConfig, storage: Path) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": settings.cpus_per_worker} | ({"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {})
    # Ranks that share a GPU are none of nccl's.
    fewest, most = settings.workers
    backend = "nccl" if settings.gpus_per_worker >= 1 else "gloo"
    return TorchTrainer(
        rank,
        torch_config=TorchConfig(backend=backend, timeout_s=_COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(
            num_workers=(fewest, most) if fewest < most else most,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name="train", storage_path=str(storage.absolute()), failure_config=FailureConfig(max_failures=settings.max_failures)
        ),
    )


def _fit(trainer: Any, attempt: Attempt) -> BaseException | None:
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
                say("ray: the workers have not started yet; waiting (does the cluster have the resources, and nobody else uses them?)")
                impatient += 10 * _PATIENCE_SECONDS
    return attempt.failure or ended[0]


def _rank(loop: Loop, arguments: dict[str, Any], settings: RayConfig, attempt: Attempt) -> None:
    """In a worker: one rank's part."""
    if not attempt.wanted:
        return
    import ray.train

    device = set_up(MachineConfig(device="cuda" if settings.gpus_per_worker else "cpu", num_threads=settings.cpus_per_worker))
    context = ray.train.get_context()
    rank, world, (fewest, most) = context.get_world_rank(), context.get_world_size(), settings.workers
    notice = Notices(rank == 0, world < most) if settings.address else None
    ranks = Ranks(rank, world, device, fewest < most, notice)
    try:
        with _heard(attempt, ranks) if ranks.first else nullcontext():
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
def _heard(attempt: Attempt, ranks: Ranks) -> Iterator[None]:
    with attempt.said.open("a", encoding="utf-8") as said, redirect_stderr(said):
        again = attempt.begun.exists()
        if ranks.elastic:
            now = f"ray: {_counted(ranks.world)} now"
            say(f"\n{now}; all go on from the newest checkpoint" if again else now)
        elif again:
            say("\nray: a worker was lost; all start again from the newest checkpoint")
        attempt.begun.touch()
        yield
