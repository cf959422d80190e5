"""A fit of targets on a simulated clock: the engine's own decisions, on nodes that boot late, are slow and are taken away."""

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from benchmarks.fit_cloud import Conditions, Draws
from benchmarks.static_assignment import Policy

_POLL_S = 5.0


@dataclass(slots=True)
class _Node:
    asked: float
    slowness: float
    up: bool = False
    leaving: bool = False
    idle_since: float = 0.0
    actors: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Actor:
    """`known`: to the policy, which it may be for a moment longer than it lives."""

    node: int | None = None
    queue: deque[int] = field(default_factory=deque)
    began: float = math.inf
    known: bool = False
    leaving: bool = False
    dead: bool = False


@dataclass(frozen=True)
class Result:
    """How a simulated fit went.

    Attributes:
        efficiency: useful over paid actor-seconds; useful is every block once, on a node of ordinary speed.
        wall_s: from the first demand for nodes to the last result.
        usd: all nodes, from the demand to when they are given back or taken away, the head, and the commits.
        redone: actor-seconds at work that led to no first result, over the useful ones.
        copies: stragglers that were doubled.
        nodes: how many were asked for.
        late_s: the longest that news waited for the driver.
    """

    efficiency: float
    wall_s: float
    usd: float
    redone: float
    copies: int
    nodes: int
    late_s: float


class Simulation:
    """One fit; `policy` decides, this is the cluster and the shell around the decisions."""

    def __init__(self, conditions: Conditions, draws: Draws, policy: Policy) -> None:
        self.c, self.draws, self.policy = conditions, draws, policy
        self.now, self.number, self.events = 0.0, count(), list[tuple[float, int, Callable[..., None], tuple[Any, ...]]]()
        self.nodes, self.actors = dict[int, _Node](), dict[int, _Actor]()
        self.pending = deque[int]()
        self.num_staff = 0
        self.driver_free = self.store_free = self.launch_free = 0.0
        self.paid = self.busy = self.first = self.late = 0.0
        self.tried, self.wake, self.num_nodes, self.commits = set[int](), math.inf, 0, 0

    def run(self, limit_s: float = math.inf) -> Result | None:
        """Simulate until all blocks are finished and the nodes given back; None if that takes longer than `limit_s`."""
        self._decide()
        self._poll()
        while not self.policy.drained:
            self.now, _, act, args = heapq.heappop(self.events)
            if self.now > limit_s:
                return None
            act(*args)
        assert len(self.policy.finished) == self.c.num_blocks
        for node in self.nodes.values():
            self.paid += self.c.per_node * (self.now + (self.c.idle_s if node.up else 0.0) - node.asked)
        for actor in self.actors.values():
            self._die(actor)
        return self._result()

    def _result(self) -> Result:
        useful, c = self.draws.useful_s, self.c
        usd = self.paid / 3600 * c.usd_per_vcpu_hour + self.now / 3600 * c.usd_per_hour + self.commits * c.usd_per_commit
        redone = max(0.0, self.busy - self.first) / useful
        return Result(useful / self.paid, self.now, usd, redone, self.policy.num_copies, self.num_nodes, self.late)

    def _at(self, time: float, act: Callable[..., None], *args: Any) -> None:
        if time < math.inf:
            heapq.heappush(self.events, (time, next(self.number), act, args))

    # The shell around the decisions

    def _news(self, act: Callable[..., Any], *args: Any) -> None:
        """The driver takes one piece of news after another."""
        self.driver_free = max(self.now, self.driver_free) + 1 / self.c.calls_per_s
        self.late = max(self.late, self.driver_free - self.now)
        self._at(self.driver_free, self._handle, act, args)

    def _handle(self, act: Callable[..., Any], args: tuple[Any, ...]) -> None:
        act(*args)
        self._decide()

    def _decide(self) -> None:
        for worker, block in self.policy.assignments(self.now):
            self.actors[worker].queue.append(block)
            self._begin(worker)
        for worker, block in self.policy.stale():
            self._cancel(worker, block)
        for worker in self.policy.superfluous(self.now):
            self._lose(worker)
        self._staff()
        wake = self.policy.wake_at(self.now)
        if wake is not None and not self.now < self.wake <= wake:
            self.wake = wake
            self._at(wake, self._decide)

    def _cancel(self, worker: int, block: int) -> None:
        queue = self.actors[worker].queue
        if self.policy.held(worker)[0] == block:
            self._lose(worker)
        elif block in list(queue)[1:]:
            queue.remove(block)
            self.policy.dropped(worker, block, self.now)
        # Else the actor is at it already, and news of that is on its way to the driver.

    def _staff(self) -> None:
        wanted = min(self.c.actors, self.policy.num_wanted)
        while self.num_staff > wanted and self.pending:
            self._remove(self.pending.pop())
        hired = wanted > self.num_staff
        while self.num_staff < wanted:
            worker = next(self.number)
            self.actors[worker] = _Actor()
            self.pending.append(worker)
            self.num_staff += 1
        if hired:
            self._seat()

    def _join(self, worker: int) -> None:
        if worker in self.actors:
            self.actors[worker].known = True
            self.policy.joined(worker, self.now)

    def _leave(self, worker: int, until: float) -> None:
        actor = self.actors.get(worker)
        if actor is None:
            return
        if not actor.known:
            return self._remove(worker)
        actor.leaving = True
        self.num_staff -= 1
        for block in self.policy.leaving(worker, self.now, until):
            if block in list(actor.queue)[1:]:
                actor.queue.remove(block)

    def _done(self, worker: int, block: int, seconds: float) -> None:
        if worker in self.actors and self.policy.done(worker, block, self.now):
            self.first += seconds

    def _lose(self, worker: int) -> None:
        if worker in self.actors:
            self.policy.lost(worker, "lost", self.now)
            self._remove(worker)

    def _remove(self, worker: int) -> None:
        actor = self.actors.pop(worker)
        self._die(actor)
        self.num_staff -= not actor.leaving
        if actor.node in self.nodes:
            node = self.nodes[actor.node]
            node.actors.discard(worker)
            node.idle_since = self.now
            self._seat()

    # Actors

    def _started(self, worker: int) -> None:
        if worker in self.actors and not self.actors[worker].dead:
            self._news(self._join, worker)

    def _begin(self, worker: int) -> None:
        actor = self.actors[worker]
        if actor.dead or actor.began < math.inf or not actor.queue:
            return
        block, node = actor.queue[0], self.nodes[actor.node or 0]
        seconds = self.draws.work[block] * node.slowness
        if block in self.draws.hiccups and block not in self.tried:
            seconds *= self.c.hiccup_factor
        self.tried.add(block)
        actor.began = self.now
        self._at(self.now + seconds, self._computed, worker)

    def _computed(self, worker: int) -> None:
        if worker in self.actors and not self.actors[worker].dead:
            self.store_free = max(self.now, self.store_free) + self.c.block * self.c.task_kb / 1000 / self.c.store_mb_per_s
            self._at(self.store_free + self.c.latency_s, self._committed, worker)

    def _committed(self, worker: int) -> None:
        actor = self.actors.get(worker)
        if actor is None or actor.dead:
            return
        seconds = self.now - actor.began
        actor.began = math.inf
        self.busy += seconds
        self.commits += 1
        self._news(self._done, worker, actor.queue.popleft(), seconds)
        self._begin(worker)

    def _die(self, actor: _Actor) -> None:
        self.busy += max(0.0, self.now - actor.began)
        actor.dead, actor.began = True, math.inf

    # Nodes

    def _poll(self) -> None:
        """The autoscaler: nodes for pending actors, none for nobody."""
        coming = sum(self.c.per_node for node in self.nodes.values() if not node.up)
        for _ in range(math.ceil((len(self.pending) - coming) / self.c.per_node)):
            self._launch()
        for number, node in list(self.nodes.items()):
            if node.up and not node.actors and self.now - node.idle_since >= self.c.idle_s:
                self._end(number)
        self._at(self.now + _POLL_S, self._poll)

    def _launch(self) -> None:
        number = self.num_nodes
        self.num_nodes += 1
        boot, slowness, life = self.draws.node(number)
        self.launch_free = max(self.now, self.launch_free) + 1 / self.c.nodes_per_s
        self.nodes[number] = _Node(self.launch_free, slowness)
        up = self.launch_free + boot
        self._at(up, self._node_up, number)
        if self.c.notice_s:
            self._at(up + max(0.0, life - self.c.notice_s), self._notice, number)
        self._at(up + life, self._node_gone, number)

    def _node_up(self, number: int) -> None:
        self.nodes[number].up, self.nodes[number].idle_since = True, self.now
        self._seat()

    def _seat(self) -> None:
        """Pending actors start where there is room."""
        for number, node in self.nodes.items() if self.pending else ():
            while node.up and not node.leaving and self.pending and len(node.actors) < self.c.per_node:
                worker = self.pending.popleft()
                node.actors.add(worker)
                self.actors[worker].node = number
                self._at(self.now + self.c.start_s * node.slowness, self._started, worker)

    def _notice(self, number: int) -> None:
        if number in self.nodes:
            self.nodes[number].leaving = True
            for worker in sorted(self.nodes[number].actors):
                self._news(self._leave, worker, self.now + self.c.notice_s)

    def _node_gone(self, number: int) -> None:
        if number in self.nodes:
            for worker in sorted(self.nodes[number].actors):
                self._die(self.actors[worker])
                self._news(self._lose, worker)
            self._end(number)

    def _end(self, number: int) -> None:
        self.paid += self.c.per_node * (self.now - self.nodes.pop(number).asked)
