"""Who holds which blocks, and since when: what the decisions of `distributed.scheduling` rest on."""

import heapq
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

Block = TypeVar("Block", bound=Hashable)
Worker = TypeVar("Worker", bound=Hashable)


@dataclass(slots=True)
class Hand(Generic[Block]):
    """A worker.

    Attributes:
        held: the blocks that it has taken and not reported, in the order of its work.
        since: when the first of these became the first.
        fed: whether it may get more.
        leaving: whether it may be gone before it is done.
        until: when it will be gone, if it is leaving and that is known.
        failures: how many of its blocks failed in a row.
        watch: the number of the entry about it that counts, in the heap of what is at work.
    """

    held: deque[Block] = field(default_factory=deque)
    since: float = 0.0
    fed: bool = True
    leaving: bool = False
    until: float = -math.inf
    failures: int = 0
    watch: int = -1


class Holdings(Generic[Worker, Block]):
    """Blocks in workers' hands; a block may be in two: a copy is stale when it is not needed any more.

    Args:
        ahead: how many blocks a worker may hold.

    Attributes:
        hands: the workers.
        holders: who holds a block that is not finished, the first taker first.
        stale: the stale copies.
        fed, idle, room, stocked, unfit: workers that may get blocks and stay; those that may get one and hold none; of `fed` those that
            hold fewer than `ahead`; those that hold more than the one they are at; those that may get none and hold none. In the
            order of the last news of them, so that the same news leads to the same decisions.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self.hands: dict[Worker, Hand[Block]] = {}
        self.holders: dict[Block, list[Worker]] = {}
        self.stale: dict[tuple[Worker, Block], None] = {}
        self.fed, self.idle, self.room, self.stocked, self.unfit = (OrderedDict[Worker, None]() for _ in range(5))
        # Entries that no longer count are dropped when they come up.
        self._at_work: list[tuple[float, int, Worker]] = []
        self._number = count()

    def add(self, worker: Worker, now: float) -> None:
        """A worker that holds nothing."""
        assert worker not in self.hands, "a worker joins once"
        self.hands[worker] = Hand(since=now)
        self.place(worker)

    def remove(self, worker: Worker) -> Hand[Block]:
        """Forget a worker, and return what it was; an unknown one was nothing."""
        hand = self.hands.get(worker, Hand())
        held = list(hand.held)
        for block in held:
            self._release(worker, block)
        hand.held.extend(held)
        self.hands.pop(worker, None)
        for pool in self._pools:
            pool.pop(worker, None)
        return hand

    def hold(self, worker: Worker, block: Block, now: float) -> None:
        """A worker takes a block, as its last."""
        hand = self.hands[worker]
        hand.held.append(block)
        self.holders.setdefault(block, []).append(worker)
        if len(hand.held) == 1:
            hand.since = now
            self.watch(worker, now)
        self.place(worker)

    def release(self, worker: Worker, block: Block, now: float) -> None:
        """A worker no longer holds a block; the next comes to work if that was its first."""
        hand = self.hands[worker]
        was_first = hand.held[0] == block
        self._release(worker, block)
        if was_first and hand.held:
            hand.since = now
            self.watch(worker, now)
            if hand.held[0] in self.holders:
                # Taken over, but too late: it is no loss to let both go on.
                self.stale.pop((worker, hand.held[0]), None)
        self.place(worker)

    def finish(self, block: Block) -> None:
        """A block is finished: whoever still holds it has a stale copy."""
        for worker in self.holders.pop(block):
            self.mark_stale(worker, block)

    def mark_stale(self, worker: Worker, block: Block) -> None:
        """A copy is not needed."""
        self.stale[worker, block] = None
        self.place(worker)

    def queued(self, worker: Worker) -> list[Block]:
        """What a worker holds and is not at, without stale copies."""
        return [block for block in list(self.hands[worker].held)[1:] if (worker, block) not in self.stale]

    def watch(self, worker: Worker, since: float) -> None:
        """Count the time at work of a worker's first block from `since`; for ever, where the worker may be gone before it is done."""
        hand = self.hands[worker]
        hand.watch = next(self._number)
        in_doubt = hand.leaving and not hand.fed
        heapq.heappush(self._at_work, (-math.inf if in_doubt else since, hand.watch, worker))

    def longest_at_work(self) -> tuple[float, Block] | None:
        """Of the blocks at work that nobody else holds, the one that has been so for the longest time: since when, and which."""
        while self._at_work:
            since, number, worker = self._at_work[0]
            hand = self.hands.get(worker)
            if hand and hand.watch == number and hand.held and len(self.holders.get(hand.held[0], ())) == 1:
                return since, hand.held[0]
            heapq.heappop(self._at_work)
        return None

    def place(self, worker: Worker) -> None:
        """Put a worker into the pools where it belongs, as the last."""
        hand = self.hands[worker]
        num_held, stays = len(hand.held), hand.fed and not hand.leaving
        belongs = (
            stays,
            hand.fed and not num_held,
            stays and 0 < num_held < self._ahead,
            num_held > 1 and bool(self.queued(worker)),
            not hand.fed and not num_held,
        )
        for pool, belonging in zip(self._pools, belongs, strict=True):
            pool.pop(worker, None)
            if belonging:
                pool[worker] = None

    @property
    def _pools(self) -> tuple[OrderedDict[Worker, None], ...]:
        return self.fed, self.idle, self.room, self.stocked, self.unfit

    def _release(self, worker: Worker, block: Block) -> None:
        self.hands[worker].held.remove(block)
        self.stale.pop((worker, block), None)
        holders = self.holders.get(block, [])
        if worker in holders:
            holders.remove(worker)
            for other in holders:
                self._leave_to(other, block)
        if not holders:
            self.holders.pop(block, None)

    def _leave_to(self, worker: Worker, block: Block) -> None:
        """A worker is now the only one that holds a block."""
        self.stale.pop((worker, block), None)
        if self.hands[worker].held[0] == block:
            self.watch(worker, self.hands[worker].since)
        self.place(worker)


class RecentMedian:
    """The median of the last 99 numbers."""

    def __init__(self) -> None:
        self._order, self._sorted = deque[float](), list[float]()

    def add(self, number: float) -> None:
        """One more."""
        self._order.append(number)
        insort(self._sorted, number)
        if len(self._order) > 99:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]

    @property
    def value(self) -> float:
        """Infinite where there is none."""
        return self._sorted[len(self._sorted) // 2] if self._sorted else math.inf
