import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed.finalize import finalize
from distributed.identity import IDENTITY
from distributed.shard import pack
from distributed.store import DamagedShards, StoreConfig, TargetStore, compact
from metadiff import targets
from metadiff.artifact import digest
from metadiff.config import validate
from metadiff.episodes import EpisodeSampler
from metadiff.errors import UserError
from metadiff.learners import LearnerConfig, build_learner
from metadiff.targets import DIAGNOSTICS, TargetsConfig, TargetSolver, write_targets
from tests.distributed.stores import BLOCKS, MINE, OTHER, Place, commit, content, filled, flipped, name, raising, same, tensors

DAMAGE: dict[str, Callable[[TargetStore], bytes]] = {
    "truncated": lambda store: content(store, 1)[:-1],
    "empty": lambda store: b"",
    "header cut": lambda store: content(store, 1)[:100],
    "longer": lambda store: content(store, 1) + b"\0",
    "flipped byte": lambda store: flipped(content(store, 1), len(content(store, 1)) - 20),
    "flipped byte in the header": lambda store: flipped(content(store, 1), 30),
    "another block's": lambda store: content(store, 0),
    "another store's": lambda store: pack(digest(OTHER), 1, 4, 7, tensors(1)),
}
SEEN_BY_SIZE = {"truncated", "empty", "header cut", "longer"}


def test_settings() -> None:
    assert StoreConfig() == StoreConfig(url=None, block=1024, endpoint_url=None)
    with pytest.raises(UserError, match="block=0"):
        validate(StoreConfig, {"block": 0}, "test")


def test_what_is_committed_is_read_back(place: Place) -> None:
    store = place.store()
    assert store.missing(3) == [0, 1, 2]
    assert commit(store, 1)
    assert store.missing(3) == [0, 2]
    assert [store.has(block) for block in BLOCKS] == [False, True, False]
    assert same(store.read(1), 1)
    shard = store.shard(1)
    assert (shard.first, shard.last) == (4, 7)
    assert not commit(store, 1)


def test_a_store_is_found_again(place: Place) -> None:
    filled(place.store())
    again = place.store()
    assert again.missing(3) == []
    assert all(same(again.read(block), block) for block in BLOCKS)


def test_a_store_can_be_sent_to_a_worker(place: Place) -> None:
    store = pickle.loads(pickle.dumps(filled(place.store())))
    assert same(store.read(2), 2)


def test_a_damaged_shard_is_told_and_mended(place: Place) -> None:
    store = filled(place.store())
    whole = content(store, 1)
    for damage, damaged in DAMAGE.items():
        store.blobs.put(name(1), damaged(store))
        with pytest.raises(DamagedShards, match=r"block-00000001\.safetensors (has|does|belongs|is)") as caught:
            store.read(1)
        assert caught.value.blocks == (1,)
        assert (damage, store.missing(3)) == (damage, [1] if damage in SEEN_BY_SIZE else [])
        assert (damage, store.has(1)) == (damage, damage == "flipped byte")
        assert commit(store, 1)
        assert content(store, 1) == whole
        assert not commit(store, 1)


def test_damage_survives_the_way_back_from_a_worker(tmp_path: Path) -> None:
    with pytest.raises(DamagedShards) as caught:
        TargetStore.open(tmp_path, MINE).read(2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.blocks) == (str(caught.value), (2,))
    assert "is missing" in str(again)


def test_one_damaged_header_does_not_condemn_shards_of_its_size(tmp_path: Path) -> None:
    store = filled(TargetStore.open(tmp_path, MINE))
    store.blobs.put(name(0), flipped(content(store, 0), 1))
    assert store.missing(3) == [0]
    last = content(store, 2)
    for damaged in (last[:-8], last.ljust(len(content(store, 1)), b"\0")):
        store.blobs.put(name(2), damaged)
        assert store.missing(3) == [0, 2]


def test_a_discarded_shard_is_missing(place: Place) -> None:
    store = filled(place.store())
    store.discard(0)
    store.discard(0)
    assert store.missing(3) == [0]


def test_another_identity_is_refused(place: Place) -> None:
    store = filled(place.store())
    with pytest.raises(UserError) as caught:
        place.store(OTHER)
    message = f"store {store.blobs.where}: made with config.targets.tolerance=1e-05, this configuration says 1e-06; "
    assert str(caught.value) == message + "choose another store.url, or delete that store"
    with pytest.raises(UserError, match=r"made with config\.store\.block=4, .* says 5 \(and 2 more keys differ\)"):
        place.store({**MINE, "config": {**MINE["config"], "store": {"block": 5}}, "new": 1, "features": "0"})
    assert place.store().missing(3) == []


def test_what_is_no_option_by_its_name_is_told_by_the_option(tmp_path: Path) -> None:
    TargetStore.open(tmp_path, {**MINE, "threads": 1})
    with pytest.raises(UserError, match=r"made with threads=1, this configuration says 2; set ray\.cpus_per_worker .*as then, choose"):
        TargetStore.open(tmp_path, {**MINE, "threads": 2})


def test_fresh_empties_a_store_and_nothing_else(place: Place) -> None:
    store = filled(place.store())
    finalize(store)
    store.blobs.put("notes.txt", b"mine")
    store = place.store(OTHER, fresh=True)
    assert store.missing(3) == [0, 1, 2]
    assert set(store.blobs.sizes()) == {IDENTITY, "notes.txt"}


def test_a_store_whose_emptying_is_killed_is_still_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, unlink, left = filled(TargetStore.open(tmp_path, MINE)), Path.unlink, iter([True, True])

    def killed(path: Path, missing_ok: bool = False) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            TargetStore.open(tmp_path, OTHER, fresh=True)
    with pytest.raises(UserError, match=r"made with config.targets.tolerance=1e-05"):
        TargetStore.open(tmp_path, OTHER)
    assert len(store.missing(3)) == 2


def test_a_late_writer_of_a_replaced_store_changes_nothing(tmp_path: Path) -> None:
    late = TargetStore.open(tmp_path, MINE)
    store = TargetStore.open(tmp_path, OTHER, fresh=True)
    assert commit(store, 0)
    with pytest.raises(UserError, match=r"tolerance=1e-06, this configuration says 1e-05"):
        commit(late, 0)
    assert same(store.read(0), 0)
    # What it wrote before its successor came is replaced.
    assert commit(late, 1)
    assert commit(store, 1)
    assert same(store.read(1), 1)


@pytest.mark.parametrize("damage", [lambda text: text[:-5], lambda text: text.replace(b"1e-05", b"1e-06"), lambda text: b"[]"])
def test_a_damaged_identity_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    filled(TargetStore.open(tmp_path, MINE))
    (tmp_path / IDENTITY).write_bytes(damage((tmp_path / IDENTITY).read_bytes()))
    with pytest.raises(UserError, match=r"store\.json was edited or is damaged; .* delete that file"):
        TargetStore.open(tmp_path, MINE)
    (tmp_path / IDENTITY).unlink()
    assert TargetStore.open(tmp_path, MINE).missing(3) == []


def test_compacted_targets_are_those_of_one_process(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_BLOCK", 4)
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.standard_normal((60, 8)).astype(np.float32))
    offsets, settings = np.arange(0, 61, 10), TargetsConfig(kind="ce", num_tasks=10, pull=0.1, dtype="fp16", max_iterations=5)
    sampler, learner = EpisodeSampler(offsets, 3, 1, 1, 0, "base"), build_learner(LearnerConfig())
    (tmp_path / "one").mkdir()
    write_targets(tmp_path / "one", features, offsets, sampler, learner, settings)

    store, classes, solver = place.store(), sampler.classes(np.arange(10)), TargetSolver(features, offsets, learner, settings)
    for block, (first, last) in BLOCKS.items():
        part = classes[first : last + 1]
        fit = solver.fit(part, first)
        diagnostics = {name: getattr(fit, name) for name, _ in DIAGNOSTICS}
        store.commit(block, {"targets": fit.w.half(), "classes": torch.from_numpy(part), **diagnostics}, first, last)
    (tmp_path / "many").mkdir()
    compact(store, 3, tmp_path / "many")
    for array in ("targets", "classes", "diagnostics"):
        assert (tmp_path / "many" / f"{array}.npy").read_bytes() == (tmp_path / "one" / f"{array}.npy").read_bytes()


def test_compaction_without_diagnostics(tmp_path: Path) -> None:
    store = TargetStore.open(tmp_path / "store", MINE)
    parts = [{key: value for key, value in tensors(block).items() if key != "accuracy"} for block in BLOCKS]
    for block, part in enumerate(parts):
        store.commit(block, part, *BLOCKS[block])
    compact(store, 3, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["classes.npy", "targets.npy"]
    assert np.array_equal(np.load(tmp_path / "targets.npy"), np.concatenate([part["targets"] for part in parts]))


def test_compaction_names_every_damaged_block(place: Place, tmp_path: Path) -> None:
    store = filled(place.store())
    store.discard(0)
    store.blobs.put(name(1), flipped(content(store, 1), 600))
    with pytest.raises(DamagedShards, match=r"2 shards are damaged \(blocks 0, 1\); fit them again") as caught:
        compact(store, 3, tmp_path)
    for block in caught.value.blocks:
        assert commit(store, block)
    compact(store, 3, tmp_path)
    assert np.array_equal(np.load(tmp_path / "targets.npy"), np.concatenate([tensors(block)["targets"] for block in BLOCKS]))


def test_what_a_killed_compaction_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f"targets.npy.{'0' * 32}.tmp"
    left.touch()
    compact(filled(TargetStore.open(tmp_path / "store", MINE)), 3, tmp_path)
    assert not left.exists()


def test_compaction_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(TargetStore.open(tmp_path / "store", MINE))
    monkeypatch.setattr(os, "posix_fallocate", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left"):
        compact(store, 3, tmp_path)
