"""Finalizing: a complete store's targets as one memory-mappable array beside its shards, for all who train with them."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from distributed.compaction import write_arrays
from distributed.finalized import MANIFEST, Finalized
from distributed.shard import DamagedShards, Shard
from distributed.store import TargetStore
from metadiff.artifact import digest
from metadiff.errors import UserError
from metadiff.targets import DTYPES

FORMAT = 1


def finalize(store: TargetStore, dtype: str | None = None) -> Finalized:
    """Write the arrays, see `write_arrays`, and then the manifest: without it nothing is final. What is final and intact stays.

    The manifest has the hash of the identity (`store`), of the configuration in it and of the feature bank; for each block its first
    and last task, `bytes` and `sha256`; for each array its `bytes` and `sha256`, and their common hash, `content`.

    Args:
        dtype: of the targets, "fp16" or "fp32"; None: as they were fitted.

    Raises:
        DamagedShards: the store is not complete.
        UserError: see `write_arrays`; or somebody else wrote arrays of another dtype at the same time.
        OSError: no space left.
    """
    store.blobs.prepare()
    missing = store.missing(store.num_blocks)
    if missing:
        raise DamagedShards(f"store {store.blobs.where}: {len(missing)} of {store.num_blocks} blocks are not there", tuple(missing))
    done = Finalized.read(store.blobs, store.identity_hash)
    if done and done.manifest["dtype"] == (dtype or done.manifest["shard_dtype"]) and all(map(done.is_intact, done.files)):
        return done
    # First of all: what it says of the arrays is about to become untrue.
    store.blobs.delete(MANIFEST)
    finalized = Finalized(store.blobs, _write(store, dtype))
    store.blobs.put(MANIFEST, json.dumps(finalized.manifest, indent=1).encode())
    if not finalized.has_sizes(store.blobs.sizes()):
        raise UserError(f"store {store.blobs.where}: somebody else finalized it with another --dtype meanwhile; do it again afterwards")
    return finalized


def _write(store: TargetStore, dtype: str | None) -> dict[str, Any]:
    noted = _Noted(store.shards(store.num_blocks, "finalize"))
    arrays = write_arrays(noted, store.num_tasks, store.blobs, dtype)
    manifest = {
        "format": FORMAT,
        "store": store.identity_hash,
        "config": digest(store.identity["config"]),
        "features": store.identity["features"],
        "dtype": dtype or noted.dtype,
        "shard_dtype": noted.dtype,
        "arrays": arrays,
        "content": digest(arrays),
        "blocks": noted.blocks,
    }
    return {**manifest, "checksum": digest(manifest)}


class _Noted:
    """Shards that are noted as they pass by."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self.shards = shards
        self.blocks: list[dict[str, Any]] = []
        self.dtype = ""

    def __iter__(self) -> Iterator[Shard]:
        for shard in self.shards:
            sha256 = hashlib.sha256(shard.content).hexdigest()
            self.blocks.append({"first": shard.first, "last": shard.last, "bytes": len(shard.content), "sha256": sha256})
            self.dtype = next(name for name, dtype in DTYPES.items() if shard.tensors["targets"].dtype == dtype)
            yield shard
