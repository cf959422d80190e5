"""Which worker does which block next: decisions without a cluster, so that they can be tested without one."""

from collections import Counter, defaultdict, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Block = TypeVar("Block", bound=Hashable)
Worker = TypeVar("Worker", bound=Hashable)


class Dispatcher(Generic[Worker, Block]):
    """Hands every block out until it is finished once, or has failed too often.

    A worker does its blocks one after another, in the order in which it took them. A block goes to one worker at a time,
    but twice in all where a worker was lost: after the work and before the news of it.

    Args:
        blocks: what there is to do, in this order; no two alike.
        attempts: how often a block may fail with an error.
        losses: how often a block may be the one that a lost worker was at. More than `attempts`, because workers are lost to
            preemption as well; limited, because a block that kills its worker would be tried for ever.
        ahead: how many blocks a worker may hold, so that it has the next one while the news of the last is on its way.

    Attributes:
        finished: blocks done.
        poisoned: blocks given up, with what went wrong the last time.
    """

    def __init__(self, blocks: Iterable[Block], attempts: int = 3, losses: int = 10, ahead: int = 2) -> None:
        self._waiting = deque(blocks)
        assert len(set(self._waiting)) == len(self._waiting), "no two blocks alike"
        self._attempts, self._losses, self._ahead = attempts, losses, ahead
        self._held: defaultdict[Worker, list[Block]] = defaultdict(list)
        self._failed: Counter[Block] = Counter()
        self._lost: Counter[Block] = Counter()
        self.finished: set[Block] = set()
        self.poisoned: dict[Block, str] = {}

    @property
    def drained(self) -> bool:
        """Whether every block is finished or given up."""
        return not self._waiting and not any(self._held.values())

    @property
    def num_waiting(self) -> int:
        """How many blocks no worker holds."""
        return len(self._waiting)

    @property
    def hopeless(self) -> bool:
        """Whether a block was given up before any was finished: then it is not the block that is at fault."""
        return bool(self.poisoned) and not self.finished

    def held(self, worker: Worker) -> Sequence[Block]:
        """The blocks that a worker has taken and not yet reported, in the order of its work."""
        return tuple(self._held.get(worker, ()))

    def take(self, worker: Worker) -> Block | None:
        """The next block for a worker, or None where it holds enough or nothing waits."""
        if not self._waiting or len(self._held[worker]) >= self._ahead:
            return None
        block = self._waiting.popleft()
        self._held[worker].append(block)
        return block

    def done(self, worker: Worker, block: Block) -> None:
        """A worker has finished a block."""
        self._held[worker].remove(block)
        self.finished.add(block)

    def failed(self, worker: Worker, block: Block, error: str) -> None:
        """A block raised an error: it is next again, or given up."""
        self._held[worker].remove(block)
        self._failed[block] += 1
        self._again(block, error, self._failed[block] < self._attempts)

    def lost(self, worker: Worker, error: str) -> None:
        """A worker is gone: what it held is next again, in the same order; the block it was at may have been the reason."""
        blocks = self._held.pop(worker, [])
        for block in reversed(blocks[1:]):
            self._waiting.appendleft(block)
        for block in blocks[:1]:
            self._lost[block] += 1
            self._again(block, error, self._lost[block] < self._losses)

    def _again(self, block: Block, error: str, more: bool) -> None:
        if more:
            self._waiting.appendleft(block)
        else:
            self.poisoned[block] = error
