"""One block's targets as bytes: a safetensors file whose label says whose it is and what all of its bytes hash to."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from safetensors.torch import save
from torch import Tensor

HEADER_BYTES = 4096
"""The label and the shapes lie within the first of them."""

_UNSIGNED = "0" * 64


@dataclass(frozen=True, eq=False)
class Shard:
    """A verified block.

    Attributes:
        first: id of its first task.
        last: id of its last task.
        tensors: by name, (B, ...) each, B = last - first + 1.
    """

    first: int
    last: int
    tensors: dict[str, np.ndarray]


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
        ValueError: they are truncated, altered, of another block or of another store; the message says which.
    """
    label, size = read_label(content)
    if len(content) != size:
        raise ValueError(f"has {len(content)} bytes, its header says {size}")
    signature = label["sha256"].encode()
    place = content.find(signature, 0, HEADER_BYTES)
    unsigned = hashlib.sha256(content[:place] + _UNSIGNED.encode())
    unsigned.update(memoryview(content)[place + len(signature) :])
    if unsigned.hexdigest() != label["sha256"]:
        raise ValueError("does not match its checksum")
    if label["identity"] != identity or label["block"] != f"{block:08d}":
        raise ValueError("belongs to another store or block")
    first, last = label["tasks"].split("-")
    return Shard(int(first), int(last), safetensors.numpy.load(content))


def read_label(head: bytes) -> tuple[dict[str, str], int]:
    """The label, not yet verified, and the size in bytes of the shard that begins with `head`.

    Raises:
        ValueError: it does not begin like a shard.
    """
    try:
        length = int.from_bytes(head[:8], "little")
        header = json.loads(head[8 : 8 + length])
        label = json.loads(header.pop("__metadata__")["shard"])
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        if not all(isinstance(label[key], str) for key in ("identity", "block", "tasks", "sha256")):
            raise TypeError
        return label, 8 + length + max(ends)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("is not a shard, or has a damaged header") from None
