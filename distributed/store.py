"""The store of fitted targets: one shard a block of tasks, shared by any number of writers, in a folder or on S3.

A shard is committed whole or not at all, by whoever comes first; its bytes depend on the store's identity, the block and its
targets alone, so that it does not matter who that was. What identifies the store lies in it, and another configuration's is refused.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from distributed.blobs import Blobs, open_blobs
from distributed.shard import HEADER_BYTES, Shard, pack, read_label, unpack
from metadiff.arrays import create_array
from metadiff.artifact import digest
from metadiff.config import config
from metadiff.errors import UserError
from metadiff.pipeline import flatten
from metadiff.targets import DIAGNOSTICS

FORMAT = 1
IDENTITY = "store.json"

_SHARD = re.compile(r"block-\d{8,}\.safetensors")
_SHOWN = 5


@config
class StoreConfig:
    """Where fitted targets are kept until all of them are there."""

    url: str | None = None
    """A folder that all nodes share, or `s3://bucket/prefix`; inside the run unless given."""
    block: Annotated[int, Field(gt=0)] = 1024
    """Tasks in a shard: what one worker fits at a time, and what a kill costs at most."""
    endpoint_url: str | None = None
    """Of a service that speaks S3's protocol; else AWS_ENDPOINT_URL or Amazon's own."""


class DamagedShards(UserError):
    """Some shards are missing, truncated, altered or foreign: fit `blocks` again."""

    def __init__(self, message: str, blocks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.blocks = blocks


@dataclass(frozen=True)
class TargetStore:
    """An open store; picklable, and cheap to send to workers.

    Attributes:
        blobs: its files.
        identity: all that the targets depend on, with the size of a block and the number of tasks: JSON values.
    """

    blobs: Blobs
    identity: Mapping[str, Any]

    @classmethod
    def open(cls, url: str | Path, identity: Mapping[str, Any], endpoint_url: str | None = None, fresh: bool = False) -> "TargetStore":
        """The store at `url`, a folder or `s3://bucket/prefix`; made if it is not there, by one of those who open it at once.

        Args:
            fresh: empty it first, whatever it holds.

        Raises:
            UserError: it is of another identity or damaged, or the place cannot be used.
        """
        store = cls(open_blobs(url, endpoint_url), json.loads(json.dumps({"format": FORMAT, **identity})))
        store.blobs.prepare()
        if fresh:
            store.clear()
        store._claim()
        return store

    def missing(self, num_blocks: int) -> list[int]:
        """The blocks without a shard of the right size. Reads no shard's tensors: `read` finds damage that keeps the size.

        Full blocks are equally large, so it is enough to see that one shard of a size is whole; the last block is judged by itself.
        """
        sizes, right, missing = self.blobs.sizes(), set(), []
        for block in range(num_blocks):
            size, is_last = sizes.get(_shard_name(block), 0), block == num_blocks - 1
            if (size, is_last) in right or self._has_size(block, size):
                right.add((size, is_last))
            else:
                missing.append(block)
        return missing

    def commit(self, block: int, tensors: Mapping[str, Tensor], first: int, last: int) -> bool:
        """Write the block of tasks `first` to `last`, tensors (last - first + 1, ...); False if a whole shard is there already.

        A damaged shard is replaced in one step, so that no reader ever misses it.
        """
        content, name = pack(self._hash, block, first, last, tensors), _shard_name(block)
        if self.blobs.put_new(name, content):
            return True
        try:
            self.shard(block)
        except DamagedShards:
            # A store that was emptied and given to another configuration meanwhile is not ours to mend.
            self._claim()
            self.blobs.put(name, content)
            return True
        return False

    def read(self, block: int) -> dict[str, np.ndarray]:
        """The block's tensors, every bit verified.

        Raises:
            DamagedShards: the shard is missing, damaged or foreign.
        """
        return self.shard(block).tensors

    def shard(self, block: int) -> Shard:
        """As `read`, with the ids of the tasks."""
        content = self.blobs.get(_shard_name(block))
        try:
            if content is None:
                raise ValueError("is missing")
            return unpack(content, self._hash, block)
        except ValueError as error:
            raise DamagedShards(f"store {self.blobs.where}: {_shard_name(block)} {error}; fit its tasks again", (block,)) from None

    def discard(self, block: int) -> None:
        """Remove a block's shard, if there is one."""
        self.blobs.delete(_shard_name(block))

    def clear(self) -> None:
        """Remove the store, and nothing else that may lie beside it; killed in the middle, it is still the same store."""
        names = self.blobs.sizes()
        for name in filter(_SHARD.fullmatch, names):
            self.blobs.delete(name)
        if IDENTITY in names:
            self.blobs.delete(IDENTITY)

    @property
    def _hash(self) -> str:
        return digest(self.identity)

    def _claim(self) -> None:
        """Write the identity where there is none, and refuse another."""
        content = self.blobs.get(IDENTITY)
        if content is None:
            ours = json.dumps({"identity": self.identity, "checksum": self._hash}, indent=1)
            self.blobs.put_new(IDENTITY, ours.encode())
            content = self.blobs.get(IDENTITY) or b""
        self._refuse_other(_parse_identity(content, self.blobs.where))

    def _refuse_other(self, there: Mapping[str, Any]) -> None:
        old, new = flatten(there), flatten(self.identity)
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if changed:
            first = f"{changed[0]}={old.get(changed[0])!r}, this configuration says {new.get(changed[0])!r}"
            more = f" (and {len(changed) - 1} more keys differ)" if len(changed) > 1 else ""
            raise UserError(f"store {self.blobs.where}: made with {first}{more}; choose another store.url, or delete that store")

    def _has_size(self, block: int, size: int) -> bool:
        head = self.blobs.get(_shard_name(block), HEADER_BYTES) if size else None
        try:
            label, expected = read_label(head or b"")
        except ValueError:
            return False
        return (label["identity"], expected) == (self._hash, size)


def compact(store: TargetStore, num_blocks: int, folder: Path) -> None:
    """Write a complete store's shards, one at a time, into memory-mappable arrays in `folder`.

    `targets.npy` (num_tasks, N, D) and `classes.npy` (num_tasks, N) from the tensors of these names; `diagnostics.npy`, whose fields
    are `metadiff.targets.DIAGNOSTICS`, from the tensors of the fields' names, if there are any.

    Raises:
        DamagedShards: it names every block that has to be fitted again.
        OSError: no space left.
    """
    last = store.shard(num_blocks - 1)
    arrays, damaged, covered = _create_arrays(folder, last), [], 0
    for block in tqdm(range(num_blocks), desc="compact targets", unit="block", mininterval=1.0):
        try:
            shard = store.shard(block)
        except DamagedShards:
            damaged.append(block)
            continue
        rows = slice(shard.first, shard.last + 1)
        covered += rows.stop - rows.start
        for name, tensor in shard.tensors.items():
            target = arrays[name] if name in arrays else arrays["diagnostics"][name]
            target[rows] = tensor
    for array in arrays.values():
        array.flush()
    if damaged:
        shown = ", ".join(map(str, damaged[:_SHOWN])) + (", ..." if len(damaged) > _SHOWN else "")
        raise DamagedShards(
            f"store {store.blobs.where}: {len(damaged)} shards are damaged (blocks {shown}); fit them again", tuple(damaged)
        )


def _create_arrays(folder: Path, last: Shard) -> dict[str, np.memmap]:
    length, tensors = last.last + 1, last.tensors
    arrays = {
        name: create_array(folder / f"{name}.npy", tensors[name].dtype, (length, *tensors[name].shape[1:]))
        for name in ("targets", "classes")
    }
    fields = [(name, dtype) for name, dtype in DIAGNOSTICS if name in tensors]
    return arrays | ({"diagnostics": create_array(folder / "diagnostics.npy", fields, (length,))} if fields else {})


def _parse_identity(content: bytes, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
        intact = digest(found["identity"]) == found["checksum"]
    except (ValueError, KeyError, TypeError):
        found, intact = {}, False
    if not intact:
        advice = "if the store is this configuration's, delete that file: every shard says whose it is; else delete the store"
        raise UserError(f"store {where}: {IDENTITY} was edited or is damaged; {advice}")
    return found["identity"]


def _shard_name(block: int) -> str:
    return f"block-{block:08d}.safetensors"
