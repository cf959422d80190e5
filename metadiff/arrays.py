"""Arrays on disk that are written piece by piece."""

import os
from pathlib import Path

import numpy as np


def create_array(path: Path, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A new memory-mapped `.npy` file whose room on the disk is taken at once.

    Raises:
        OSError: no space left; without this, a write into the sparse file would kill the process.
    """
    array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
