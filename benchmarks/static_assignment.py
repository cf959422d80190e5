"""Each actor a fixed share of the blocks, given out at the start: what the engine's decisions are compared with."""

from collections import deque
from collections.abc import Sequence
from typing import Protocol


class Policy(Protocol):
    """What of `distributed.scheduling.Dispatcher` a simulation needs."""

    finished: set[int]
    num_copies: int

    @property
    def drained(self) -> bool: ...
    @property
    def num_wanted(self) -> int: ...
    def held(self, worker: int) -> Sequence[int]: ...
    def joined(self, worker: int, now: float) -> None: ...
    def leaving(self, worker: int, now: float, until: float) -> list[int]: ...
    def lost(self, worker: int, error: str, now: float) -> None: ...
    def done(self, worker: int, block: int, now: float) -> bool: ...
    def dropped(self, worker: int, block: int, now: float) -> None: ...
    def assignments(self, now: float) -> list[tuple[int, int]]: ...
    def stale(self) -> list[tuple[int, int]]: ...
    def superfluous(self, now: float) -> list[int]: ...
    def wake_at(self, now: float) -> float | None: ...


class StaticAssignment:
    """Stands in for the dispatcher; an actor knows all of its share, and waits for nobody.

    Args:
        shares: into how many shares the blocks are cut.
        resumes: what a lost actor had finished is kept for the one that takes its share; else the share is done again.
    """

    num_copies = 0

    def __init__(self, num_blocks: int, shares: int, resumes: bool) -> None:
        self._resumes = resumes
        self._shares = [list(range(share, num_blocks, shares)) for share in range(min(shares, num_blocks))]
        self._free = deque(range(len(self._shares)))
        self._owned: dict[int, int] = {}
        self._left: dict[int, set[int]] = {}
        self._unfed: dict[int, None] = {}
        self._ever: set[int] = set()
        self.finished: set[int] = set()

    @property
    def drained(self) -> bool:
        return not self._free and not self._owned

    @property
    def num_wanted(self) -> int:
        return len(self._free) + len(self._owned)

    def held(self, worker: int) -> Sequence[int]:
        return sorted(self._left.get(worker, ()))

    def joined(self, worker: int, now: float) -> None:
        self._unfed[worker] = None

    def leaving(self, worker: int, now: float, until: float) -> list[int]:
        return []

    def lost(self, worker: int, error: str, now: float) -> None:
        self._unfed.pop(worker, None)
        self._left.pop(worker, None)
        if worker in self._owned:
            share = self._owned.pop(worker)
            self._free.append(share)
            if not self._resumes:
                self.finished.difference_update(self._shares[share])

    def done(self, worker: int, block: int, now: float) -> bool:
        self._left[worker].remove(block)
        is_first = block not in self._ever
        self._ever.add(block)
        self.finished.add(block)
        if not self._left[worker]:
            del self._owned[worker]
            self._unfed[worker] = None
        return is_first

    def assignments(self, now: float) -> list[tuple[int, int]]:
        given = []
        while self._unfed and self._free:
            worker, share = next(iter(self._unfed)), self._free.popleft()
            del self._unfed[worker]
            blocks = [block for block in self._shares[share] if block not in self.finished]
            if blocks:
                self._owned[worker], self._left[worker] = share, set(blocks)
                given += [(worker, block) for block in blocks]
            else:
                self._unfed[worker] = None
        return given

    def stale(self) -> list[tuple[int, int]]:
        return []

    def dropped(self, worker: int, block: int, now: float) -> None:
        raise AssertionError("nothing is stale")

    def superfluous(self, now: float) -> list[int]:
        return list(self._unfed)[len(self._free) :]

    def wake_at(self, now: float) -> float | None:
        return None
