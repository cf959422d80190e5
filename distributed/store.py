"""The store of fitted targets: one shard a block of tasks, shared by any number of writers, in a folder or in a bucket.

A shard is committed whole or not at all, by whoever comes first; its bytes depend on the store's identity, the block and its
targets alone, so that it does not matter who that was. What identifies the store lies in it, and another configuration's is refused.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from distributed.ahead import ahead
from distributed.blobs import Blobs, FolderBlobs, open_blobs
from distributed.compaction import ARRAYS, write_arrays
from distributed.finalized import MANIFEST, DamagedArray, Finalized
from distributed.identity import IDENTITY, claim, read_identity, with_format
from distributed.shard import HEADER_BYTES, BadShard, DamagedShards, Shard, check_head, pack, unpack
from metadiff.artifact import digest
from metadiff.config import config

_SHARD = re.compile(r"block-\d{8,}\.safetensors")
_SHOWN = 5
_SHARDS_AHEAD = 4


@config
class StoreConfig:
    """Where fitted targets are kept until all of them are there."""

    url: str | None = None
    """A folder that all nodes share, `s3://bucket/prefix` or `gs://bucket/prefix`; inside the run unless given."""
    block: Annotated[int, Field(gt=0)] = 1024
    """Tasks in a shard: what one worker fits at a time, and what a kill costs at most."""
    endpoint_url: str | None = None
    """Of a service that speaks S3's or Google's protocol; else AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST or Amazon's and Google's own."""
    cache: Path | None = None
    """A folder on each node's own disk, for a copy of the targets that training reads; unless given, they are read where they lie."""


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
        """The store at `url`, see `StoreConfig`; made if it is not there, by one of those who open it at once.

        Args:
            fresh: empty it first, whatever it holds.

        Raises:
            UserError: it is of another identity or damaged, or the place cannot be used.
        """
        store = cls(open_blobs(url, endpoint_url), with_format(identity))
        store.blobs.prepare()
        if fresh:
            store.clear()
        claim(store.blobs, store.identity)
        return store

    @classmethod
    def find(cls, url: str | Path, endpoint_url: str | None = None) -> "TargetStore":
        """The store that lies at `url`, whatever its identity; nothing is made.

        Raises:
            UserError: there is none, or it is damaged or of another format.
        """
        blobs = open_blobs(url, endpoint_url)
        blobs.probe()
        return cls(blobs, read_identity(blobs))

    @property
    def identity_hash(self) -> str:
        """What every shard's label carries."""
        return digest(self.identity)

    @property
    def num_tasks(self) -> int:
        """How many tasks there are when all blocks are."""
        return self.identity["config"]["targets"]["num_tasks"]

    @property
    def num_blocks(self) -> int:
        """How many blocks make it complete."""
        return math.ceil(self.num_tasks / self.identity["config"]["store"]["block"])

    def tasks(self, block: int) -> range:
        """The ids of a block's tasks."""
        size = self.identity["config"]["store"]["block"]
        return range(block * size, min((block + 1) * size, self.num_tasks))

    def missing(self, num_blocks: int) -> list[int]:
        """The blocks without a shard of the right size. Reads no shard's tensors: `read` finds damage that keeps the size.

        Full blocks are equally large, so it is enough to see that one shard of a size is whole; the last block is judged by itself.
        """
        sizes, right, missing = self.blobs.sizes(), set(), []
        for block in range(num_blocks):
            size, is_last = sizes.get(shard_name(block), 0), block == num_blocks - 1
            if (size, is_last) in right or self.fault(block, size) is None:
                right.add((size, is_last))
            else:
                missing.append(block)
        return missing

    def has(self, block: int) -> bool:
        """Whether the block has a shard of the right size and a good header: two small requests, no tensors. See `missing`."""
        return self.fault(block, self.blobs.size(shard_name(block)) or 0) is None

    def fault(self, block: int, size: int) -> str | None:
        """What is wrong with a block's shard of `size` bytes, as far as its first bytes tell; None if nothing is."""
        head = self.blobs.get(shard_name(block), stop=HEADER_BYTES) if size else b""
        try:
            check_head(head or b"", size, self.identity_hash, block)
        except BadShard as error:
            return str(error)
        return None

    def commit(self, block: int, tensors: Mapping[str, Tensor], first: int, last: int) -> bool:
        """Write the block of tasks `first` to `last`, tensors (last - first + 1, ...); False if a whole shard is there already.

        A damaged shard is replaced in one step, so that no reader ever misses it.
        """
        content, name = pack(self.identity_hash, block, first, last, tensors), shard_name(block)
        if self.blobs.put_new(name, content):
            return True
        try:
            self.shard(block)
        except DamagedShards:
            # A store that was emptied and given to another configuration meanwhile is not ours to mend.
            claim(self.blobs, self.identity)
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
        try:
            return self.unpacked(block)
        except BadShard as error:
            raise DamagedShards(f"store {self.blobs.where}: {shard_name(block)} {error}; fit its tasks again", (block,)) from None

    def unpacked(self, block: int) -> Shard:
        """As `shard`, with a BadShard that says no more than what is wrong."""
        content = self.blobs.get(shard_name(block))
        if content is None:
            raise BadShard("is missing")
        return unpack(content, self.identity_hash, block)

    def shards(self, num_blocks: int, label: str) -> Iterator[Shard]:
        """All blocks' shards, in order, read a few ahead; `label` names what is done with them to whoever watches.

        Raises:
            DamagedShards: at the end; it names every block that has to be fitted again.
        """
        damaged = []
        read = ahead(self._attempt, range(num_blocks), _SHARDS_AHEAD)
        for block, shard in enumerate(tqdm(read, label, num_blocks, unit="block", mininterval=1.0)):
            if isinstance(shard, Shard):
                yield shard
            else:
                damaged.append(block)
        if damaged:
            shown = ", ".join(map(str, damaged[:_SHOWN])) + (", ..." if len(damaged) > _SHOWN else "")
            message = f"store {self.blobs.where}: {len(damaged)} shards are damaged (blocks {shown}); fit them again"
            raise DamagedShards(message, tuple(damaged))

    def _attempt(self, block: int) -> Shard | DamagedShards:
        try:
            return self.shard(block)
        except DamagedShards as damage:
            return damage

    def discard(self, block: int) -> None:
        """Remove a block's shard, if there is one."""
        self.blobs.delete(shard_name(block))

    def clear(self) -> None:
        """Remove the store, and nothing else that may lie beside it; killed in the middle, it is still the same store."""
        names = self.blobs.sizes()
        for name in (MANIFEST, *filter(_SHARD.fullmatch, names), *ARRAYS, IDENTITY):
            if name in names:
                self.blobs.delete(name)


def compact(store: TargetStore, num_blocks: int, folder: Path) -> None:
    """Write a complete store's targets into memory-mappable arrays in `folder`, see `write_arrays`: from the finalized ones if it has any.

    Raises:
        DamagedShards: it names every block that has to be fitted again.
        OSError: no space left.
    """
    finalized = Finalized.read(store.blobs, store.identity_hash)
    if finalized is None or finalized.converted or not _copied(finalized, folder):
        arrays = FolderBlobs(folder)
        arrays.prepare()
        write_arrays(store.shards(num_blocks, "compact targets"), store.num_tasks, arrays)


def _copied(finalized: Finalized, folder: Path) -> bool:
    try:
        for name in finalized.files:
            finalized.copy(name, folder / name)
    except DamagedArray as damage:
        tqdm.write(f"{damage}; taking the shards", file=sys.stderr)
        return False
    return True


def shard_name(block: int) -> str:
    """The file of a block."""
    return f"block-{block:08d}.safetensors"


if __name__ == "__main__":
    from distributed.store_command import main

    sys.exit(main())
