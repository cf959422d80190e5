"""TensorBoard's curves of a training."""

from pathlib import Path
from typing import Any

from metadiff.metrics import Log


def tensorboard_log(folder: Path, axis: str) -> Log:
    """A log for `pretrain` and `train` that writes their rows' numbers to event files in `folder`.

    Event files hold times and host names, so they belong outside of artifacts. What a killed run wrote past its last checkpoint is
    marked as replaced.

    Args:
        axis: the key of the rows that is the curves' abscissa.
    """
    return _EventLog(folder, axis)


class _EventLog:
    def __init__(self, folder: Path, axis: str) -> None:
        self.folder, self.axis, self.writer = folder, axis, None

    def __call__(self, step: int, row: dict[str, Any]) -> None:
        if self.writer is None:
            # Here, because only rank 0 gets so far; the import alone takes a second.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=step)
        for name, value in row.items():
            if name != self.axis:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()
