"""Blocks of work dealt out to Ray actors, which may die."""

import io
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from distributed.scheduling import Dispatcher
from metadiff.errors import DISK_TROUBLE, UserError
from metadiff.machine import MachineConfig, set_up
from metadiff.pipeline import say

_PATIENCE_SECONDS = 60.0


class Worker(Protocol):
    """What an actor is made of: a plain class."""

    def run(self, block: Any, /) -> Any:
        """Do one block and return something small."""
        ...


class WorkFailed(RuntimeError):
    """Blocks failed too often; the message ends with the worker's traceback of the last failure."""


class _Outcome(NamedTuple):
    result: Any
    error: UserError | OSError | str | None
    said: str


class _Actor:
    """Runs in an actor's process; errors and what was written to stderr go home as values, free of Ray's wrapping."""

    def __init__(self, work: tuple[type[Worker], Sequence[Any]], num_threads: int) -> None:
        set_up(MachineConfig(num_threads=num_threads))
        self.worker_class, self.arguments = work
        self.worker: Worker | None = None

    def run(self, block: Any) -> _Outcome:
        with redirect_stderr(io.StringIO()) as said:
            try:
                # Here rather than in the constructor, whose errors Ray would report as the actor's death.
                if self.worker is None:
                    self.worker = self.worker_class(*self.arguments)
                return _Outcome(self.worker.run(block), None, said.getvalue())
            except UserError as error:
                return _Outcome(None, error, said.getvalue())
            except OSError as error:
                return _Outcome(None, error if error.errno in DISK_TROUBLE else traceback.format_exc(), said.getvalue())
            except Exception:
                return _Outcome(None, traceback.format_exc(), said.getvalue())


class Crew:
    """Actors at work on blocks, and the calls under way: in the process that is connected to Ray.

    A dead actor is replaced by a new one rather than restarted by Ray, which refuses calls while it does so.
    """

    def __init__(
        self, worker_class: type[Worker], arguments: Sequence[Any], dispatcher: Dispatcher, num_cpus: int, num_gpus: float
    ) -> None:
        import ray
        import ray.exceptions

        self.ray, self.errors = ray, ray.exceptions
        self.dispatcher, self.num_threads = dispatcher, num_cpus
        self.work = ray.put((worker_class, tuple(arguments)))
        self.actor_class = ray.remote(_Actor).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)
        self.actors: dict[int, Any] = {}
        self.calls: dict[Any, tuple[int, Any]] = {}
        self.hired = 0

    def results(self, num_actors: int) -> Iterator[tuple[Any, Any]]:
        """Each block with its result, until all are finished or given up.

        Raises:
            UserError, OSError: what a worker raised, as it was; of an OSError, disk space and permissions.
            WorkFailed: blocks were given up, or an actor cannot be started.
        """
        for _ in range(num_actors):
            self._hire()
        patience = _PATIENCE_SECONDS
        while not self.dispatcher.drained and not self.dispatcher.hopeless:
            self._feed()
            ready, _ = self.ray.wait(list(self.calls), timeout=patience)
            if not ready and not self.dispatcher.finished:
                say("ray: no actor has finished anything yet; if none can start, the cluster lacks the CPUs or GPUs that ray.* asks for")
                patience *= 4
            for call in ready:
                yield from self._collect(call)
        if self.dispatcher.poisoned:
            block, error = next(iter(self.dispatcher.poisoned.items()))
            more = f" (and {len(self.dispatcher.poisoned) - 1} more)" if len(self.dispatcher.poisoned) > 1 else ""
            raise WorkFailed(f"block {block}{more} was given up, having failed too often; the last time:\n{error}")

    def dismiss(self) -> None:
        """Kill all actors."""
        if self.ray.is_initialized():
            for number in list(self.actors):
                self._dismiss(number)

    def _hire(self) -> None:
        self.actors[self.hired] = self.actor_class.remote(self.work, self.num_threads)
        self.hired += 1

    def _dismiss(self, number: int) -> None:
        self.ray.kill(self.actors.pop(number))
        self.calls = {call: task for call, task in self.calls.items() if task[0] != number}

    def _feed(self) -> None:
        for number in [number for number in self.actors if not self.dispatcher.held(number)]:
            self._call(number)
        # What is taken ahead is lost to idle actors: only while there is enough for all.
        while self.dispatcher.num_waiting > len(self.actors) and any([self._call(number) for number in self.actors]):
            pass
        # An idle actor would keep its node from being given back.
        for number in [number for number in self.actors if not self.dispatcher.held(number)]:
            self._dismiss(number)

    def _call(self, number: int) -> bool:
        block = self.dispatcher.take(number)
        if block is not None:
            self.calls[self.actors[number].run.remote(block)] = (number, block)
        return block is not None

    def _collect(self, call: Any) -> Iterator[tuple[Any, Any]]:
        number, block = self.calls[call]
        try:
            outcome: _Outcome = self.ray.get(call)
        except self.errors.RayTaskError as error:
            outcome = _Outcome(None, str(error), "")
        except self.errors.RayError as error:
            self._replace(number, error)
            return
        del self.calls[call]
        if outcome.said:
            tqdm.write(outcome.said, file=sys.stderr, end="")
        if isinstance(outcome.error, Exception):
            raise outcome.error
        if outcome.error is not None:
            self.dispatcher.failed(number, block, outcome.error)
        else:
            self.dispatcher.done(number, block)
            yield block, outcome.result

    def _replace(self, number: int, error: Exception) -> None:
        if getattr(error, "actor_init_failed", False):
            raise WorkFailed(f"an actor could not be started:\n{error}")
        say(f"ray: an actor died at block {self.dispatcher.held(number)[0]}; another takes its place")
        self.dispatcher.lost(number, str(error))
        self._dismiss(number)
        self._hire()
