"""Which worker does which block next: decisions without a cluster or a clock, so that they can be tested and simulated without either."""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from distributed.holdings import Holdings, RecentMedian
from distributed.waiting import Waiting

Block = TypeVar("Block", bound=Hashable)
Worker = TypeVar("Worker", bound=Hashable)

_DESPAIR = 3
_MARGIN = 1.5


class Dispatcher(Generic[Worker, Block]):
    """Hands every block out until it is finished once, or has failed too often.

    A worker does its blocks one after another, in the order in which it took them; a block's time at work starts when it becomes
    the first that its worker holds. `now` is in seconds and never goes back. All news and every decision take O(log n).

    Blocks that failed or were lost come first, then the others in their order. A block that raised an error goes to a worker that
    it has not failed on yet, if one has joined; a worker on which `attempts` blocks in a row failed, while others succeed, gets no
    more: so one bad machine cannot use up every block's attempts. Blocks are taken ahead only while there is one for everybody.
    When nothing waits, an idle worker takes over a block that another holds and is not at, or else doubles a straggler: a block
    that has been at work for longer than usual, or whose worker is leaving.

    Args:
        blocks: what there is to do, in this order; no two alike.
        attempts: how often a block may fail with an error.
        losses: how often a block may be the one that a lost worker was at. More than `attempts`, because workers are lost to
            preemption as well; limited, because a block that kills its worker would be tried for ever.
        ahead: how many blocks a worker may hold: more than one where the news of a block takes long beside the block.
        outages: how often a block may fail with a pause, which is a service's fault.
        straggler: a block at work for more than so many medians of the last blocks' times is a straggler. Only the idle double it,
            so that little is lost by being early: `benchmarks/simulate_fit.py` says how much is won.
        patience: seconds that a block may be at work without being a straggler, whatever the others took.
        spares: idle workers to keep at the end, per block at work, rounded up: they take what is lost, and stragglers.

    Attributes:
        finished: blocks done.
        poisoned: blocks given up, with what went wrong the last time.
        num_retries: how often a block failed and was not given up.
        num_losses: how often a lost worker was at a block that nobody else held; not counting workers that were leaving.
        num_copies: how many stragglers were doubled.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        attempts: int = 3,
        losses: int = 10,
        ahead: int = 1,
        *,
        outages: int = 10,
        straggler: float = 1.0,
        patience: float = 5.0,
        spares: float = 0.05,
    ) -> None:
        self._attempts, self._straggler_medians, self._patience, self._spares = attempts, straggler, patience, spares
        self._waiting = Waiting[Worker, Block](blocks, {"error": attempts, "loss": losses, "outage": outages})
        self._book = Holdings[Worker, Block](ahead)
        self._usual = RecentMedian()
        self.finished: set[Block] = set()
        self.poisoned = self._waiting.poisoned
        self.num_retries = self.num_losses = self.num_copies = 0

    @property
    def drained(self) -> bool:
        """Whether every block is finished or given up; workers may still be at copies of finished ones."""
        return not self.num_waiting and not self._book.holders

    @property
    def num_waiting(self) -> int:
        """How many blocks no worker holds, those in a pause included."""
        return len(self._waiting)

    @property
    def num_wanted(self) -> int:
        """How many workers could be of use, pending ones included and leaving ones not: more should not be hired."""
        return self.num_waiting + len(self._book.holders)

    @property
    def hopeless(self) -> bool:
        """Whether several blocks were given up before any was finished: then it is not the blocks that are at fault."""
        return len(self.poisoned) >= _DESPAIR and not self.finished

    def held(self, worker: Worker) -> Sequence[Block]:
        """The blocks that a worker has taken and not yet reported, in the order of its work; none of an unknown worker."""
        return tuple(self._book.hands[worker].held) if worker in self._book.hands else ()

    def num_failures(self, block: Block) -> int:
        """How often a block has failed so far, with and without a pause: what a growing pause grows with."""
        return self._waiting.num_failures(block)

    # News of workers

    def joined(self, worker: Worker, now: float) -> None:
        """A worker has started: from now on it is fed. One that is still pending holds nothing and is not known here."""
        self._book.add(worker, now)

    def leaving(self, worker: Worker, now: float, until: float = -math.inf) -> list[Block]:
        """A worker's node is being drained: it takes nothing ahead, and its loss will not be held against the block it is at.

        Returns the blocks that it holds and is not at, which wait again: the shell cancels the calls. An unknown worker holds none.

        Args:
            until: when it will be gone, if that is known: it gets blocks that should be done by then. Else it gets no more.
        """
        if worker not in self._book.hands:
            return []
        hand = self._book.hands[worker]
        hand.leaving, hand.until = True, until
        hand.fed = hand.fed and self._has_time(worker, hand.since if hand.held else now)
        back = list(hand.held)[1:]
        for block in reversed(back):
            self._book.release(worker, block, hand.since)
            self._return(block)
        if hand.held:
            self._book.watch(worker, hand.since)
        self._book.place(worker)
        return back

    def lost(self, worker: Worker, error: str, now: float) -> None:
        """A worker is gone, by itself or killed: what it held waits again, first; the block it was at may have been the reason.

        That block is given up after `losses`. No loss is counted where it is finished, somebody else holds it or the worker was
        leaving. An unknown worker held nothing.
        """
        hand = self._book.remove(worker)
        for block in reversed(list(hand.held)[1:]):
            self._return(block)
        for block in list(hand.held)[:1]:
            if self._is_free(block):
                if not hand.leaving:
                    self.num_losses += 1
                    self._waiting.note(block, "loss")
                self._waiting.try_again(block, error, now)

    # News of blocks

    def done(self, worker: Worker, block: Block, now: float) -> bool:
        """A worker has finished a block; returns whether it was the first to do so."""
        hand, is_first = self._book.hands[worker], block not in self.finished
        if is_first:
            if hand.held[0] == block:
                self._usual.add(now - hand.since)
            self.finished.add(block)
            self._book.finish(block)
        hand.failures, hand.fed = 0, self._has_time(worker, now)
        self._book.release(worker, block, now)
        return is_first

    def failed(self, worker: Worker, block: Block, error: str, now: float, pause: float = 0.0) -> None:
        """A block raised an error: it waits again, after `pause` seconds, or is given up after `attempts`.

        Args:
            pause: for trouble that is neither the block's nor the worker's fault, such as a service that is down: it counts towards
                `outages` instead. The shell makes it grow with `num_failures`.
        """
        self._book.release(worker, block, now)
        if block in self.finished:
            return
        if pause:
            self._waiting.note(block, "outage")
        else:
            self._waiting.note(block, "error", worker)
            self._mistrust(worker)
        for other in self._book.holders.get(block, ()):
            # Else the failed copy would be made again at once.
            self._book.watch(other, now)
        if self._is_free(block):
            self.num_retries += self._waiting.try_again(block, error, now + pause)

    def dropped(self, worker: Worker, block: Block, now: float) -> None:
        """The shell has cancelled a copy of `stale()`: the worker no longer holds it. Where it killed the worker, `lost` is enough."""
        self._book.release(worker, block, now)
        self._return(block)

    # Decisions

    def assignments(self, now: float) -> list[tuple[Worker, Block]]:
        """Who shall do what, from now on held by them: first one block for each idle worker, then what is taken ahead."""
        self._waiting.end_pauses(now)
        given: list[tuple[Worker, Block]] = []
        for worker in list(self._book.idle):
            if not self._has_time(worker, now):
                self._book.hands[worker].fed = False
                self._book.place(worker)
                continue
            block = self._choose(worker, now)
            if block is not None:
                given.append((worker, block))
                self._book.hold(worker, block, now)
            elif not self._waiting.has_choosy:
                break
        fresh = self._waiting.fresh
        while self._book.room and len(fresh) > len(self._book.fed):
            given.append((next(iter(self._book.room)), fresh.popleft()))
            self._book.hold(*given[-1], now)
        return given

    def stale(self) -> list[tuple[Worker, Block]]:
        """Copies that are not needed: of finished blocks, and of blocks that were taken over from a worker that is not at them yet.

        The shell cancels them, or kills the worker that is at one (`held(worker)[0]`), and tells `dropped` or `lost`. Best right after
        `assignments`: a worker that comes to a block which was taken over from it keeps it, as a copy.
        """
        return list(self._book.stale)

    def superfluous(self, now: float) -> list[Worker]:
        """Workers without work that will not get any, for the shell to kill, so that their nodes can be given back; it tells `lost`."""
        has_use = self._book.stocked or self._straggler()[0] <= now
        kept = math.ceil(self._spares * len(self._book.holders)) + self.num_waiting
        return [*self._book.unfit, *([] if has_use else list(self._book.idle)[kept:])]

    def wake_at(self, now: float) -> float | None:
        """When a decision may change without news, if ever: a pause ends, or a block becomes a straggler while somebody is idle."""
        straggler = self._straggler()[0] if self._book.idle and not self._waiting.fresh else math.inf
        due = min(straggler, self._waiting.pause_ends)
        return max(now, due) if due < math.inf else None

    def _choose(self, worker: Worker, now: float) -> Block | None:
        """What an idle worker should do."""
        block = self._waiting.take(worker, self._book.fed)
        if block is not None:
            return block
        if self._book.stocked:
            return self._take_over(next(iter(self._book.stocked)))
        due, straggler = self._straggler()
        if due > now:
            return None
        self.num_copies += 1
        return straggler

    def _has_time(self, worker: Worker, now: float) -> bool:
        """Whether a block that a worker comes to now should be done before the worker is gone."""
        hand = self._book.hands[worker]
        return not hand.leaving or now + _MARGIN * self._usual.value < hand.until

    def _take_over(self, holder: Worker) -> Block:
        block = self._book.queued(holder)[-1]
        self._book.mark_stale(holder, block)
        return block

    def _straggler(self) -> tuple[float, Block | None]:
        """The next straggler, and when it becomes one."""
        since, block = self._book.longest_at_work() or (math.inf, None)
        after = max(self._patience, self._straggler_medians * self._usual.value)
        return (since + after if math.isfinite(since) else since), block

    def _is_free(self, block: Block) -> bool:
        return block not in self.finished and block not in self._book.holders

    def _return(self, block: Block) -> None:
        if self._is_free(block):
            self._waiting.put_back(block)

    def _mistrust(self, worker: Worker) -> None:
        """One more failure in a row: after `attempts` it may be the worker's fault, if others succeed."""
        hand = self._book.hands[worker]
        hand.failures += 1
        others = len(self._book.fed) - (worker in self._book.fed)
        hand.fed = hand.fed and not (hand.failures >= self._attempts and others and self.finished)
        self._book.place(worker)
