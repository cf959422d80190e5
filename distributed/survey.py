"""What a store holds: which blocks are whole, missing or damaged, and what else is there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tqdm import tqdm

from distributed.ahead import ahead
from distributed.compaction import ARRAYS
from distributed.finalized import MANIFEST, Finalized
from distributed.identity import IDENTITY
from distributed.shard import BadShard
from distributed.store import TargetStore, shard_name

_AHEAD = 4
"""Shards in memory at once."""
_HEADERS_AHEAD = 16


@dataclass(frozen=True)
class Survey:
    """A store's state.

    Attributes:
        missing: blocks without a shard.
        damaged: blocks whose shard is damaged or foreign, with what is wrong with it.
        foreign: names of files that are not this store's.
        num_bytes: in the shards of this store's blocks.
        finalized: its arrays, if they are there.
        damaged_arrays: what is wrong with them, by name; of the manifest too.
    """

    store: TargetStore
    missing: list[int]
    damaged: Mapping[int, str]
    foreign: list[str]
    num_bytes: int
    finalized: Finalized | None
    damaged_arrays: Mapping[str, str]

    @property
    def bad_blocks(self) -> list[int]:
        """The blocks that have to be fitted."""
        return sorted([*self.missing, *self.damaged])

    @property
    def num_tasks(self) -> int:
        """How many tasks are there."""
        return self.store.num_tasks - sum(len(self.store.tasks(block)) for block in self.bad_blocks)

    @property
    def whole(self) -> bool:
        """Whether every block is there and nothing is damaged."""
        return not self.bad_blocks and not self.damaged_arrays


def survey(store: TargetStore, every_bit: bool = False) -> Survey:
    """See what is there, from sizes and headers; with `every_bit` all is read and compared with its checksums."""
    sizes = store.blobs.sizes()
    blocks = range(store.num_blocks)
    there = {block: sizes[shard_name(block)] for block in blocks if shard_name(block) in sizes}
    own = {IDENTITY, MANIFEST, *ARRAYS, *map(shard_name, blocks)}
    finalized = Finalized.read(store.blobs, store.identity_hash)
    return Survey(
        store,
        missing=[block for block in blocks if block not in there],
        damaged=_damaged(store, there, every_bit),
        foreign=sorted(name for name in sizes if name not in own),
        num_bytes=sum(there.values()),
        finalized=finalized,
        damaged_arrays=_damaged_arrays(finalized, sizes, every_bit),
    )


def _damaged(store: TargetStore, there: Mapping[int, int], every_bit: bool) -> dict[int, str]:
    def by_header(block: int) -> str | None:
        return store.fault(block, there[block])

    def by_content(block: int) -> str | None:
        try:
            store.unpacked(block)
        except BadShard as error:
            return str(error)
        return None

    fault: Callable[[int], str | None] = by_content if every_bit else by_header
    faults = ahead(fault, there, _AHEAD if every_bit else _HEADERS_AHEAD)
    watched = tqdm(faults, "verify" if every_bit else "stat", len(there), unit="shard", mininterval=1.0, delay=2.0)
    return {block: fault for block, fault in zip(there, watched, strict=True) if fault}


def _damaged_arrays(finalized: Finalized | None, sizes: Mapping[str, int], every_bit: bool) -> dict[str, str]:
    if finalized is None:
        return {MANIFEST: "is damaged, or another store's"} if MANIFEST in sizes else {}
    faults = {}
    for name, entry in finalized.files.items():
        size = sizes.get(name)
        if size is None:
            faults[name] = "is missing"
        elif size != entry["bytes"]:
            faults[name] = f"has {size} bytes, {MANIFEST} says {entry['bytes']}"
        elif every_bit and not finalized.is_intact(name):
            faults[name] = "does not match its checksum"
    return faults
