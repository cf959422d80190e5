"""Shards, one after the other, into memory-mappable arrays."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np

from distributed.blobs import Blobs
from distributed.shard import Shard
from metadiff.errors import UserError
from metadiff.targets import DIAGNOSTICS, DTYPES

ARRAYS = ("targets.npy", "classes.npy", "diagnostics.npy")


def write_arrays(shards: Iterable[Shard], num_tasks: int, blobs: Blobs, dtype: str | None = None) -> dict[str, dict[str, Any]]:
    """Write a whole store's shards, in order, as arrays; returns each file's `bytes` and `sha256`.

    `targets.npy` (num_tasks, N, D) and `classes.npy` (num_tasks, N) from the tensors of these names; `diagnostics.npy`, whose fields
    are `metadiff.targets.DIAGNOSTICS`, from the tensors of the fields' names, if there are any.

    Args:
        dtype: of the targets, "fp16" or "fp32"; None: as they are.

    Raises:
        UserError: a target is too large for `dtype`.
        OSError: no space left.
    """
    shards = iter(shards)
    first = next(shards)
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(_array(blobs, name, rows.dtype, (num_tasks, *rows.shape[1:])))
            for name, rows in _rows(first, dtype).items()
        }
        for shard in chain([first], shards):
            for name, rows in _rows(shard, dtype).items():
                writers[name](rows)
    return {f"{name}.npy": writer.entry for name, writer in writers.items()}


class _Writer:
    """Appends rows to an array's file, and hashes it."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.write, self.hash, self.size = write, hashlib.sha256(), 0

    def __call__(self, rows: np.ndarray) -> None:
        self.append(rows.tobytes())

    def append(self, content: bytes) -> None:
        self.hash.update(content)
        self.size += len(content)
        self.write(content)

    @property
    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.hash.hexdigest()}


@contextmanager
def _array(blobs: Blobs, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[_Writer]:
    header = io.BytesIO()
    layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    with blobs.writing(f"{name}.npy", len(header.getvalue()) + dtype.itemsize * int(np.prod(shape))) as write:
        writer = _Writer(write)
        writer.append(header.getvalue())
        yield writer


def _rows(shard: Shard, dtype: str | None) -> dict[str, np.ndarray]:
    """What a shard adds to each array."""
    tensors = shard.tensors
    rows = {"targets": _converted(tensors["targets"], dtype), "classes": tensors["classes"]}
    fields = [(name, kind) for name, kind in DIAGNOSTICS if name in tensors]
    return rows | ({"diagnostics": _records(tensors, fields)} if fields else {})


def _converted(targets: np.ndarray, dtype: str | None) -> np.ndarray:
    if dtype is None or targets.dtype == DTYPES[dtype]:
        return targets
    with np.errstate(over="ignore"):
        converted = targets.astype(DTYPES[dtype])
    if not np.isfinite(converted).all() and np.isfinite(targets).all():
        raise UserError(f"targets up to {np.abs(targets).max():.3g} do not fit into {dtype}; keep them as they are (no --dtype)")
    return converted


def _records(tensors: Mapping[str, np.ndarray], fields: list[tuple[str, str]]) -> np.ndarray:
    records = np.empty(len(tensors["targets"]), fields)
    for name, _ in fields:
        records[name] = tensors[name]
    return records
