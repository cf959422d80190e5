"""What runs in a Ray actor's process: a worker, built once, that does one block after another."""

import io
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from typing import Any, NamedTuple, Protocol

from metadiff.errors import DISK_TROUBLE, UserError
from metadiff.machine import MachineConfig, set_up


class Worker(Protocol):
    """What an actor is made of: a plain class."""

    def run(self, block: Any, /) -> Any:
        """Do one block and return something small."""
        ...


class Outcome(NamedTuple):
    """What came of a call: errors are values here, free of Ray's wrapping.

    Attributes:
        result: what the worker returned.
        error: what the user should know, as it was raised; of anything else the traceback.
        said: what was written to stderr.
    """

    result: Any = None
    error: UserError | OSError | str | None = None
    said: str = ""


class Actor:
    """A worker in a process of its own, or in the driver's.

    Args:
        work: the worker's class and its arguments.
    """

    def __init__(self, work: tuple[type[Worker], Sequence[Any]]) -> None:
        self._class, self._arguments = work
        self._worker: Worker | None = None

    def prepare(self, num_threads: int) -> Outcome:
        """Build the worker; the result is the id of the node that this is on.

        Not in the constructor, whose errors Ray would report as the actor's death.
        """
        import ray

        with redirect_stderr(io.StringIO()) as said:
            set_up(MachineConfig(num_threads=num_threads))
            outcome = self._attempt(self._build)
            return Outcome(ray.get_runtime_context().get_node_id(), outcome.error, said.getvalue())

    def run(self, block: Any) -> Outcome:
        """Do a block."""
        with redirect_stderr(io.StringIO()) as said:
            return self.run_aloud(block)._replace(said=said.getvalue())

    def run_aloud(self, block: Any) -> Outcome:
        """Do a block, building the worker first where that is not done, and let it write where it likes."""
        return self._attempt(lambda: self._build().run(block))

    def _build(self) -> Worker:
        if self._worker is None:
            self._worker = self._class(*self._arguments)
        return self._worker

    @staticmethod
    def _attempt(work: Callable[[], Any]) -> Outcome:
        try:
            return Outcome(work())
        except UserError as error:
            return Outcome(error=error)
        except OSError as error:
            return Outcome(error=error if error.errno in DISK_TROUBLE else traceback.format_exc())
        except Exception:
            return Outcome(error=traceback.format_exc())
