"""What comes of blocks of work, wherever they are done: it is told to the dispatcher, counted, and shown to the user."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from tqdm import tqdm

from distributed.actors import Actor, Outcome
from distributed.blobs import StoreUnavailable
from distributed.scheduling import Dispatcher
from metadiff.errors import Unfinished

_LONGEST_PAUSE = 60.0
_SHOWN = 5


@dataclass(slots=True)
class Tally:
    """How the work goes.

    Attributes:
        alive: actors that have begun.
        pending: actors that were asked for and have not.
        most: the most that were alive at once.
        retries: how often a block was tried again after an error.
        losses: how often an actor was lost at a block.
        copies: how often a block that took long was given to a second actor.
    """

    alive: int = 0
    pending: int = 0
    most: int = 0
    retries: int = 0
    losses: int = 0
    copies: int = 0

    def __str__(self) -> str:
        parts = [f"actors {self.alive}"] if self.most else []
        parts += [f"{self.pending} pending"] if self.pending else []
        parts += [f"{name} {count}" for name in ("retries", "losses", "copies") if (count := getattr(self, name))]
        return ", ".join(parts)

    def count(self, dispatcher: Dispatcher[Any, Any], alive: int, pending: int) -> None:
        """Bring it up to date."""
        self.alive, self.pending, self.most = alive, pending, max(self.most, alive)
        self.retries, self.losses, self.copies = dispatcher.num_retries, dispatcher.num_losses, dispatcher.num_copies


Watch = Callable[[Tally], None]
"""Is told how it goes, about once a second."""


class GivenUp(Unfinished):
    """Blocks failed too often, and all others are done, or nothing ever went well.

    Attributes:
        poisoned: these blocks, each with what went wrong the last time: the traceback of an error.
    """

    def __init__(self, poisoned: Mapping[Any, str]) -> None:
        self.poisoned = dict(poisoned)
        shown = ", ".join(map(str, list(poisoned)[:_SHOWN])) + (", ..." if len(poisoned) > _SHOWN else "")
        reason = last_line(next(reversed(self.poisoned.values())))
        super().__init__(
            f"given up, having failed too often: {shown} ({reason}); what is done stays, the same command tries the rest again"
        )


def record(dispatcher: Dispatcher[Any, Any], worker: Any, block: Any, outcome: Outcome) -> bool:
    """Tell the dispatcher what came of a block; whether its result is the first.

    Raises:
        UserError, OSError: those of the outcome, but for a store's that does not answer for now.
    """
    now, error = time.monotonic(), outcome.error
    if error is None:
        return dispatcher.done(worker, block, now)
    if isinstance(error, StoreUnavailable):
        pause = min(2.0 ** dispatcher.num_failures(block), _LONGEST_PAUSE)
        tell(f"block {block}: {error}; again in {pause:.0f} s")
        dispatcher.failed(worker, block, str(error), now, pause)
    elif isinstance(error, Exception):
        raise error
    else:
        tell(f"block {block} failed: {last_line(error)}")
        dispatcher.failed(worker, block, error, now)
    return False


def give_up(dispatcher: Dispatcher[Any, Any]) -> None:
    """Show the last traceback in full, and say what was given up.

    Raises:
        GivenUp: if there is anything.
    """
    if dispatcher.poisoned:
        tell(next(reversed(dispatcher.poisoned.values())))
        raise GivenUp(dispatcher.poisoned)


def results_here(worker: Actor, dispatcher: Dispatcher[int, Any], watch: Watch) -> Iterator[tuple[Any, Any]]:
    """Each block with its result, all done in this process. Raises as `record` and `give_up` do."""
    tally, numbers = Tally(), count()
    dispatcher.joined(next(numbers), time.monotonic())
    while not dispatcher.drained and not dispatcher.hopeless:
        now = time.monotonic()
        # Among several it would be dismissed for its failures; here it is given another chance.
        for here in dispatcher.superfluous(now):
            dispatcher.lost(here, "", now)
            dispatcher.joined(next(numbers), now)
        todo = dispatcher.assignments(now)
        if not todo:
            time.sleep(max(0.0, (dispatcher.wake_at(now) or now) - now))
        for here, block in todo:
            outcome = worker.run_aloud(block)
            if record(dispatcher, here, block, outcome):
                yield block, outcome.result
            tally.count(dispatcher, 0, 0)
            watch(tally)
    give_up(dispatcher)


def tell(text: str) -> None:
    """A line to the user, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


def last_line(text: str) -> str:
    """Of a traceback, what it is about."""
    return text.strip().rpartition("\n")[2]
