"""How far a fit is: the bar on the screen, and the record that stays beside the artifact."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distributed.fitting import Order
from distributed.tally import GivenUp, Tally, last_line
from metadiff.artifact import write_atomically
from metadiff.errors import Unfinished, UserError

_SHOWN = 5


class Progress:
    """Of one command; written to its file whatever ends it, but for a kill.

    Args:
        file: what to write, such as `<run>/fit_targets/<variant>.summary.json`.
        missing: the blocks to fit.
    """

    def __init__(self, file: Path, order: Order, missing: Sequence[int]) -> None:
        self.file, self.order, self.missing = file, order, set(missing)
        self.fitted = self.skipped = 0
        self.tallies: list[Tally] = []
        self.poisoned: dict[int, str] = {}
        self.began = self.next_look = time.monotonic()
        total = order.targets.num_tasks
        self.bar = tqdm(total=total, initial=total - self._tasks_missing, desc="fit targets", unit="task", mininterval=1.0)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write the record at the end of what is done within, unless that refuses its input before anything is done.

        Raises:
            Unfinished: for blocks that were given up.
        """
        refused = False
        try:
            yield
        except GivenUp as error:
            self.poisoned = error.poisoned
            raise Unfinished(self._what_is_missing()) from None
        except UserError as error:
            error.work_kept = error.work_kept or self.fitted > 0
            refused = not error.work_kept
            raise
        finally:
            self.bar.close()
            if not refused:
                write_atomically(self.file, json.dumps(self.summary(), indent=1).encode())

    def watch(self, tally: Tally) -> None:
        """Show how the actors do; every `work_through` has a tally of its own."""
        if not any(tally is known for known in self.tallies):
            self.tallies.append(tally)
        self.bar.set_postfix_str(str(tally), refresh=False)
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + 1.0
            self.bar.refresh()

    def done(self, block: int, is_ours: bool) -> None:
        """A block is in the store, fitted by this command's actors or by another's."""
        tasks = len(self.order.tasks(block))
        self.missing.discard(block)
        self.fitted += tasks * is_ours
        self.skipped += tasks * (not is_ours)
        self.bar.update(tasks)

    def undo(self, blocks: Sequence[int]) -> None:
        """Blocks that were done turn out to be damaged."""
        self.missing.update(blocks)
        self.bar.update(-sum(len(self.order.tasks(block)) for block in blocks))

    def summary(self) -> dict[str, Any]:
        """What happened, in JSON values; tasks are counted, not blocks."""
        seconds = time.monotonic() - self.began
        return {
            "tasks": self.order.targets.num_tasks,
            "fitted": self.fitted,
            "skipped": self.skipped,
            "missing": self._tasks_missing,
            "seconds": round(seconds, 3),
            "tasks_per_second": round(self.fitted / seconds, 3),
            "actors": max((tally.most for tally in self.tallies), default=0),
            **{name: sum(getattr(tally, name) for tally in self.tallies) for name in ("retries", "losses", "copies")},
            "poisoned": [self._poisoned(block) for block in sorted(self.poisoned)],
        }

    @property
    def _tasks_missing(self) -> int:
        return sum(len(self.order.tasks(block)) for block in self.missing)

    def _poisoned(self, block: int) -> dict[str, Any]:
        tasks, error = self.order.tasks(block), self.poisoned[block]
        return {"block": block, "first": tasks.start, "last": tasks.stop - 1, "error": last_line(error), "traceback": error}

    def _what_is_missing(self) -> str:
        counts = f"{self._tasks_missing} of {self.order.targets.num_tasks} tasks are missing"
        which = f"block{'s' * (len(self.poisoned) > 1)} {spans(self.poisoned)} failed too often"
        reason = last_line(next(reversed(self.poisoned.values())))
        return f"fit_targets: {counts}: {which} ({reason}); see {self.file}; the same command tries only what is missing"


def spans(blocks: Sequence[int] | dict[int, Any]) -> str:
    """Numbers for people, such as `1, 4-7, 9`; of many spans the first few."""
    ordered = sorted(blocks)
    starts = [ordered[0]] + [b for a, b in pairwise(ordered) if b != a + 1]
    stops = [a for a, b in pairwise(ordered) if b != a + 1] + [ordered[-1]]
    words = [str(start) if start == stop else f"{start}-{stop}" for start, stop in zip(starts, stops, strict=True)]
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
