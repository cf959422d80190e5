"""One block's targets as bytes: a safetensors file whose label says whose it is and what all of its bytes hash to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from safetensors.torch import save
from torch import Tensor

from metadiff.errors import UserError

HEADER_BYTES = 4096
"""The label and the shapes lie within the first of them."""

_UNSIGNED = "0" * 64


class BadShard(ValueError):
    """A shard that is truncated, altered, or another's; the message says what is wrong with it."""


class DamagedShards(UserError):
    """Some shards are missing, truncated, altered or foreign: fit `blocks` again."""

    def __init__(self, message: str, blocks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.blocks = blocks


@dataclass(frozen=True, eq=False)
class Shard:
    """A verified block.

    Attributes:
        first: id of its first task.
        last: id of its last task.
        tensors: by name, (B, ...) each, B = last - first + 1.
        content: the file.
    """

    first: int
    last: int
    tensors: dict[str, np.ndarray]
    content: bytes


def pack(identity: str, block: int, first: int, last: int, tensors: Mapping[str, Tensor]) -> bytes:
    """The shard of tasks `first` to `last`: its bytes depend on the arguments alone, its size on their shapes alone."""
    assert all(len(tensor) == last - first + 1 for tensor in tensors.values()), f"block {block}: not one row for each task"
    label = {"identity": identity, "block": f"{block:08d}", "tasks": f"{first:012d}-{last:012d}", "sha256": _UNSIGNED}
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # The label is one entry: several would be written in an order that changes from process to process.
    content = bytearray(save(flat, metadata={"shard": json.dumps(label)}))
    assert int.from_bytes(content[:8], "little") <= HEADER_BYTES - 8, f"block {block}: too many tensors for the header"
    place = content.index(_UNSIGNED.encode(), 0, HEADER_BYTES)
    content[place : place + len(_UNSIGNED)] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def unpack(content: bytes, identity: str, block: int) -> Shard:
    """What `pack` made bytes of, checked bit by bit.

    Raises:
        BadShard: they are truncated, altered, of another block or of another store.
    """
    label = _read_label(content, len(content))
    signature = label["sha256"].encode()
    place = content.find(signature, 0, HEADER_BYTES)
    unsigned = hashlib.sha256(content[:place] + _UNSIGNED.encode())
    unsigned.update(memoryview(content)[place + len(signature) :])
    if unsigned.hexdigest() != label["sha256"]:
        raise BadShard("does not match its checksum")
    _check_owner(label, identity, block)
    first, last = label["tasks"].split("-")
    return Shard(int(first), int(last), safetensors.numpy.load(content), content)


def check_head(head: bytes, size: int, identity: str, block: int) -> None:
    """As far as can be told from a file's first `HEADER_BYTES` and its size, whether it is what `pack` made.

    Raises:
        BadShard: it is not.
    """
    _check_owner(_read_label(head, size), identity, block)


def _check_owner(label: Mapping[str, str], identity: str, block: int) -> None:
    if label["identity"] != identity or label["block"] != f"{block:08d}":
        raise BadShard("belongs to another store or block")


def _read_label(head: bytes, size: int) -> dict[str, str]:
    """The label, not yet verified, of a file of `size` bytes that begins with `head`."""
    try:
        length = int.from_bytes(head[:8], "little")
        header = json.loads(head[8 : 8 + length])
        label = json.loads(header.pop("__metadata__")["shard"])
        expected = 8 + length + max(tensor["data_offsets"][1] for tensor in header.values())
        if not all(isinstance(label[key], str) for key in ("identity", "block", "tasks", "sha256")):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise BadShard("is not a shard, or has a damaged header") from None
    if size != expected:
        raise BadShard(f"has {size} bytes, its header says {expected}")
    return label
