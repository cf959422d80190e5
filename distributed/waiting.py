"""The blocks that nobody holds: in which order they come, after which pause, and when they are given up."""

import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Hashable, Iterable, Mapping
from itertools import count
from typing import Generic, TypeVar

Block = TypeVar("Block", bound=Hashable)
Worker = TypeVar("Worker", bound=Hashable)


class Waiting(Generic[Worker, Block]):
    """Blocks that had trouble, some of them in a pause; then the others, in their order.

    Args:
        blocks: no two alike.
        limits: how often a block may have trouble, by kind.

    Attributes:
        fresh: the blocks without trouble.
        poisoned: the blocks given up, with what went wrong the last time.
    """

    def __init__(self, blocks: Iterable[Block], limits: Mapping[str, int]) -> None:
        self.fresh = deque(blocks)
        assert len(set(self.fresh)) == len(self.fresh), "no two blocks alike"
        self.poisoned: dict[Block, str] = {}
        self._limits = limits
        self._again: deque[Block] = deque()
        self._paused: list[tuple[float, int, Block]] = []
        self._number = count()
        self._trouble: defaultdict[Block, Counter[str]] = defaultdict(Counter)
        self._blamed: defaultdict[Block, set[Worker]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self.fresh) + len(self._again) + len(self._paused)

    @property
    def has_choosy(self) -> bool:
        """Whether there are blocks that not every worker may take."""
        return bool(self._again)

    @property
    def pause_ends(self) -> float:
        """When the next pause ends."""
        return self._paused[0][0] if self._paused else math.inf

    def num_failures(self, block: Block) -> int:
        """How often a block has failed, whatever the reason."""
        return self._trouble[block].total() - self._trouble[block]["loss"] if block in self._trouble else 0

    def put_back(self, block: Block) -> None:
        """A block that had no trouble is the next of these again."""
        self.fresh.appendleft(block)

    def note(self, block: Block, kind: str, blamed: Worker | None = None) -> None:
        """A block had trouble; `blamed` shall not get it again if there is another."""
        self._trouble[block][kind] += 1
        if blamed is not None:
            self._blamed[block].add(blamed)

    def try_again(self, block: Block, error: str, at: float) -> bool:
        """Let a block that had trouble wait until then; or give it up, and return False."""
        if any(self._trouble[block][kind] >= limit for kind, limit in self._limits.items()):
            self.poisoned[block] = error
            return False
        heapq.heappush(self._paused, (at, next(self._number), block))
        return True

    def end_pauses(self, now: float) -> None:
        """Blocks whose pause is over line up."""
        while self.pause_ends <= now:
            self._again.append(heapq.heappop(self._paused)[-1])

    def take(self, worker: Worker, fed: Collection[Worker]) -> Block | None:
        """The next block for a worker, one of those `fed` or not."""
        for index, block in enumerate(self._again):
            blamed = self._blamed.get(block, ())
            if worker not in blamed or all(other in blamed for other in fed):
                del self._again[index]
                return block
        return self.fresh.popleft() if self.fresh else None
