import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distributed.shard import BadShard, pack, unpack
from distributed.store import TargetStore
from metadiff.artifact import digest
from tests.distributed.stores import MINE, filled, flipped, name, same, tensors


def test_a_shard_is_a_safetensors_file_that_says_whose_it_is(tmp_path: Path) -> None:
    store = filled(TargetStore.open(tmp_path, MINE))
    with safe_open(tmp_path / name(2), framework="pt") as file:
        label = json.loads(file.metadata()["shard"])
        assert torch.equal(file.get_tensor("targets"), tensors(2)["targets"])
    assert label["identity"] == digest(store.identity)
    assert (label["block"], label["tasks"]) == ("00000002", "000000000008-000000000009")


def test_bytes_depend_on_the_arguments_and_size_on_the_shapes() -> None:
    some = {"w": torch.ones(2, 3), "c": torch.zeros(2), "a": torch.ones(2)}
    packed = [pack("i" * 64, 1, 2, 3, part) for part in [some, dict(reversed(some.items()))] * 10]
    assert packed == packed[:1] * 20
    assert len(packed[0]) == len(pack("i" * 64, 10**6, 10**9, 10**9 + 1, {name: -part for name, part in some.items()}))


def test_every_flipped_byte_of_a_shard_is_seen() -> None:
    data = pack("i" * 64, 0, 0, 3, tensors(0))
    assert same(unpack(data, "i" * 64, 0).tensors, 0)
    for position in range(len(data)):
        with pytest.raises(BadShard, match=r"."):
            unpack(flipped(data, position), "i" * 64, 0)
    for size in range(len(data)):
        with pytest.raises(BadShard, match=r"."):
            unpack(data[:size], "i" * 64, 0)
