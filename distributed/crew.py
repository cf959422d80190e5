"""Blocks of work dealt out to Ray actors, which come and go: the dispatcher decides, this carries it out."""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

from tqdm import tqdm

from distributed.actors import Actor, Outcome, Worker
from distributed.scheduling import Dispatcher
from distributed.tally import Tally, Watch, give_up, last_line, record, tell
from metadiff.errors import Unfinished

_POLL_SECONDS = 1.0
_FETCH_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0
_SHORTEST_BREAK, _LONGEST_BREAK = 0.5, 30.0
_BROKEN_STARTS, _LOST_STARTS = 3, 12


@dataclass(slots=True)
class _Hired:
    """An actor: its handle, the node where it has begun, and whether that is going away."""

    handle: Any
    node: str | None = None
    is_leaving: bool = False


class Crew:
    """Actors at work on blocks, in the process that is connected to Ray.

    A dead actor is replaced by a new one rather than restarted by Ray, which refuses calls while it does so. All that may be of use
    are asked for at once: while the cluster has no room for them, they are the demand that an autoscaler sees.

    The dispatcher is to let an actor hold one block at a time (`ahead` 1): Ray cannot take back a call that waits behind another, and an
    actor of two threads, which could, has glibc map and zero every large tensor anew. Blocks take seconds, a call a millisecond.

    Args:
        num_actors: the most at once.
    """

    def __init__(
        self,
        worker_class: type[Worker],
        arguments: Sequence[Any],
        dispatcher: Dispatcher[int, Any],
        num_actors: int,
        num_cpus: int,
        num_gpus: float,
        watch: Watch,
    ) -> None:
        import ray
        import ray.exceptions

        self.ray, self.errors = ray, ray.exceptions
        self.dispatcher, self.num_actors, self.num_threads, self.watch = dispatcher, num_actors, num_cpus, watch
        self.work = ray.put((worker_class, tuple(arguments)))
        self.actor_class: Any = ray.remote(Actor).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)
        self.actors: dict[int, _Hired] = {}
        self.starting: dict[Any, int] = {}
        self.calls: dict[Any, tuple[int, Any]] = {}
        self.fallen: list[Any] = []
        self.numbers, self.tally = count(), Tally()
        self.bad_starts, self.hire_from, self.next_poll = 0, 0.0, 0.0

    def results(self) -> Iterator[tuple[Any, Any]]:
        """Each block with its result, until all are finished or given up.

        Raises:
            UserError, OSError: what a worker raised, as it was; of an OSError, disk space and permissions.
            GivenUp: blocks failed too often.
            Unfinished: no actor can be started.
        """
        impatient = time.monotonic() + _PATIENCE_SECONDS
        while not self.dispatcher.drained and not self.dispatcher.hopeless:
            self._heed_notices()
            self._staff()
            self._feed()
            self._report()
            for call in self._news():
                yield from self._collect(call)
            if time.monotonic() > impatient and not self.tally.most:
                tell("ray: no actor has begun yet; if the cluster is not adding nodes, it lacks the CPUs or GPUs that ray.* asks for")
                impatient += 10 * _PATIENCE_SECONDS
        self._report()
        give_up(self.dispatcher)

    def dismiss(self) -> None:
        """Kill all actors."""
        if self.ray.is_initialized():
            for number in list(self.actors):
                self._dismiss(number)

    # Who works

    def _staff(self) -> None:
        """As many actors as can be of use, and no more: whoever is idle would keep its node from being given back."""
        wanted = min(self.num_actors, self.dispatcher.num_wanted)
        spare = sum(not hired.is_leaving for hired in self.actors.values()) - wanted
        for number in list(self.starting.values())[::-1][: max(0, spare)]:
            self._dismiss(number)
        if time.monotonic() >= self.hire_from:
            for _ in range(-spare):
                self._hire()
        for number in self.dispatcher.superfluous(time.monotonic()):
            self._lose(number)

    def _hire(self) -> None:
        number, handle = next(self.numbers), self.actor_class.remote(self.work)
        self.actors[number] = _Hired(handle)
        self.starting[handle.prepare.remote(self.num_threads)] = number

    def _welcome(self, reference: Any) -> None:
        """An actor has begun, or could not."""
        number, outcome = self.starting[reference], self._outcome(reference)
        if isinstance(outcome, Exception):
            broken = getattr(outcome, "actor_init_failed", False)
            return self._not_started(number, str(outcome), _BROKEN_STARTS if broken else _LOST_STARTS)
        if isinstance(outcome.error, Exception):
            raise outcome.error
        if outcome.error:
            return self._not_started(number, outcome.error, _BROKEN_STARTS)
        del self.starting[reference]
        self.bad_starts, self.hire_from = 0, 0.0
        self.actors[number].node = outcome.result
        self.dispatcher.joined(number, time.monotonic())

    def _not_started(self, number: int, error: str, limit: int) -> None:
        """Another is hired after a break: it may be the node, or a node that went away with many of them."""
        self._dismiss(number)
        if time.monotonic() < self.hire_from:
            return
        self.bad_starts += 1
        self.hire_from = time.monotonic() + min(_SHORTEST_BREAK * 2**self.bad_starts, _LONGEST_BREAK)
        if self.bad_starts >= limit and len(self.starting) == len(self.actors):
            tell(error)
            raise Unfinished(f"ray: no actor can be started ({last_line(error)}); what is done stays, the same command goes on from there")

    def _dismiss(self, number: int) -> None:
        handle = self.actors.pop(number).handle
        self.calls = {call: task for call, task in self.calls.items() if task[0] != number}
        self.starting = {call: starting for call, starting in self.starting.items() if starting != number}
        # Of an actor that Ray has forgotten, or in a cluster that is gone, there is nothing left to kill.
        with suppress(ValueError, self.errors.RayError):
            self.ray.kill(handle)

    def _lose(self, number: int, error: str = "") -> None:
        self.dispatcher.lost(number, error, time.monotonic())
        self._dismiss(number)

    def _heed_notices(self) -> None:
        """Use nodes that are being drained only until their deadline: an actor there may finish what it is at, and is then gone."""
        if time.monotonic() < self.next_poll:
            return
        self.next_poll = time.monotonic() + _POLL_SECONDS
        draining = self._draining()
        for number, hired in self.actors.items():
            milliseconds = draining.get(hired.node or "")
            if milliseconds is not None and not hired.is_leaving:
                hired.is_leaving = True
                deadline = milliseconds / 1000  # seconds since 1970; 0 if it is not known
                until = time.monotonic() + deadline - time.time() if deadline else -math.inf
                self.dispatcher.leaving(number, time.monotonic(), until)

    def _draining(self) -> Mapping[str, int]:
        # The cluster's head, which tells, may be restarting.
        with suppress(self.errors.RayError, TimeoutError):
            return self.ray._private.state.state.get_draining_nodes()
        return {}

    # Who does what

    def _feed(self) -> None:
        for number in {number for number, _ in self.dispatcher.stale()}:
            self._lose(number)  # at what another has finished
        for number, block in self.dispatcher.assignments(time.monotonic()):
            self.calls[self.actors[number].handle.run.remote(block)] = (number, block)

    def _news(self) -> list[Any]:
        """The calls that have come back, after a second at most."""
        now = time.monotonic()
        due = self.dispatcher.wake_at(now)
        timeout = _POLL_SECONDS if due is None else min(_POLL_SECONDS, max(0.0, due - now))
        under_way = [*self.starting, *self.calls]
        if not under_way:
            time.sleep(timeout)
            return []
        ready, rest = self.ray.wait(under_way, timeout=timeout, fetch_local=False)
        if ready and rest:
            ready += self.ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return ready

    def _collect(self, reference: Any) -> Iterator[tuple[Any, Any]]:
        if reference in self.starting:
            return self._welcome(reference)
        if reference not in self.calls:  # its actor was lost a moment ago, with another call
            return
        number, block = self.calls[reference]
        outcome = self._outcome(reference)
        if isinstance(outcome, Exception):
            self.fallen.append(block)
            return self._lose(number, str(outcome))
        del self.calls[reference]
        if record(self.dispatcher, number, block, outcome):
            yield block, outcome.result

    def _outcome(self, reference: Any) -> Outcome | Exception:
        """What came of a call; an exception where the actor is lost."""
        try:
            outcome: Outcome = self.ray.get(reference, timeout=_FETCH_SECONDS)
        except self.errors.RayTaskError as error:
            return Outcome(error=str(error))
        except self.errors.RayError as error:
            return error
        if outcome.said:
            tqdm.write(outcome.said, file=sys.stderr, end="")
        return outcome

    def _report(self) -> None:
        if self.fallen:
            where = ", ".join(map(str, self.fallen))
            tell(f"ray: lost {len(self.fallen)} actor{'s' * (len(self.fallen) > 1)}, at {where}; others do it again")
            self.fallen.clear()
        self.tally.count(self.dispatcher, len(self.actors) - len(self.starting), len(self.starting))
        self.watch(self.tally)
