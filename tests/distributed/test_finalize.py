"""Arrays beside the shards: whole, or not there."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from distributed import s3
from distributed.compaction import ARRAYS
from distributed.finalize import finalize
from distributed.finalized import MANIFEST, Finalized
from distributed.store import DamagedShards, TargetStore, compact
from metadiff.artifact import digest
from metadiff.errors import UserError
from tests.distributed.stores import BLOCKS, MINE, OTHER, Place, Service, commit, content, filled, flipped, name, tensors

ROOT = Path(__file__).parents[2]


def files(store: TargetStore) -> dict[str, bytes]:
    return {file: store.blobs.get(file) or b"" for file in (*ARRAYS, MANIFEST)}


def array(store: TargetStore, folder: Path, file: str = "targets.npy") -> np.ndarray:
    (folder / file).write_bytes(store.blobs.get(file) or b"")
    return np.load(folder / file, mmap_mode="r")


def test_finalized_arrays_are_the_compacted_ones(place: Place, tmp_path: Path) -> None:
    store = filled(place.store())
    compact(store, 3, tmp_path)
    finalized = finalize(store)
    assert all(store.blobs.get(file) == (tmp_path / file).read_bytes() for file in ARRAYS)
    assert np.array_equal(np.load(tmp_path / "targets.npy"), np.concatenate([tensors(block)["targets"] for block in BLOCKS]))
    found = Finalized.read(store.blobs, store.identity_hash)
    assert found is not None
    assert found.manifest == finalized.manifest


def test_the_manifest_says_what_is_there(place: Place) -> None:
    store = filled(place.store())
    manifest = finalize(store).manifest
    assert (manifest["config"], manifest["features"]) == (digest(MINE["config"]), MINE["features"])
    assert (manifest["dtype"], manifest["shard_dtype"]) == ("fp16", "fp16")
    shards = [content(store, block) for block in BLOCKS]
    assert manifest["blocks"] == [
        {"first": first, "last": last, "bytes": len(shard), "sha256": sha256(shard).hexdigest()}
        for (first, last), shard in zip(BLOCKS.values(), shards, strict=True)
    ]
    for file in ARRAYS:
        whole = store.blobs.get(file) or b""
        assert manifest["arrays"][file] == {"bytes": len(whole), "sha256": sha256(whole).hexdigest()}
    assert store.missing(3) == []


def test_another_dtype_on_request(place: Place, tmp_path: Path) -> None:
    store = filled(place.store())
    finalize(store)
    assert finalize(store, "fp32").converted
    targets = array(store, tmp_path)
    assert targets.dtype == np.float32
    assert np.array_equal(targets.astype(np.float16), np.concatenate([tensors(block)["targets"] for block in BLOCKS]))


def test_targets_too_large_for_a_dtype_are_refused(tmp_path: Path) -> None:
    store = TargetStore.open(tmp_path, MINE)
    for block in BLOCKS:
        part = {**tensors(block), "targets": tensors(block)["targets"].float()}
        part["targets"][1, 1, 1] = 1e5
        store.commit(block, part, *BLOCKS[block])
    with pytest.raises(UserError, match=r"targets up to 1e\+05 do not fit into fp16"):
        finalize(store, "fp16")
    assert not {*ARRAYS, MANIFEST} & {*store.blobs.sizes()}
    finalize(store)


def test_what_is_final_and_intact_stays(tmp_path: Path) -> None:
    store = filled(TargetStore.open(tmp_path, MINE))
    finalize(store)
    before = {file: (tmp_path / file).stat().st_ino for file in (*ARRAYS, MANIFEST)}
    finalize(store)
    assert before == {file: (tmp_path / file).stat().st_ino for file in (*ARRAYS, MANIFEST)}


@pytest.mark.parametrize("file", ["targets.npy", "classes.npy", MANIFEST])
def test_what_is_damaged_is_made_anew(place: Place, file: str) -> None:
    store = filled(place.store())
    finalize(store)
    whole = files(store)
    for damaged in (flipped(whole[file], 150), whole[file][:-3]):
        store.blobs.put(file, damaged)
        finalize(store)
        assert files(store) == whole
    store.blobs.delete(file)
    finalize(store)
    assert files(store) == whole


def test_an_incomplete_store_is_refused(place: Place) -> None:
    store = filled(place.store())
    store.discard(1)
    with pytest.raises(DamagedShards, match=r"1 of 3 blocks are not there") as caught:
        finalize(store)
    assert caught.value.blocks == (1,)
    assert commit(store, 1)
    for block in (0, 2):
        store.blobs.put(name(block), flipped(content(store, block), len(content(store, block)) - 9))
    with pytest.raises(DamagedShards, match=r"2 shards are damaged \(blocks 0, 2\)"):
        finalize(store)
    assert not {*ARRAYS, MANIFEST} & {*store.blobs.sizes()}


def test_two_at_once_harm_nothing(place: Place) -> None:
    filled(place.store())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: finalize(place.store()), range(2)))
    finalized = Finalized.read(place.store().blobs, place.store().identity_hash)
    assert finalized is not None
    assert all(map(finalized.is_intact, ARRAYS))


KILLED = """if True:
    import os, signal, sys
    from distributed import finalize, s3
    from distributed.store import TargetStore
    s3._PART_BYTES = 5 * 2**20
    store = TargetStore.find(sys.argv[1], sys.argv[2] or None)
    calls = iter(range(int(sys.argv[3])))
    def killing(call):
        def counted(*arguments):
            next(calls, None) is None and os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return counted
    finalize.digest = killing(finalize.digest)
    store.unpacked.__func__.__globals__["unpack"] = killing(store.unpacked.__func__.__globals__["unpack"])
    finalize.finalize(store)
"""


@pytest.mark.parametrize(("where", "calls"), [("folder", 0), ("folder", 2), ("folder", 4), ("bucket", 3), ("google_bucket", 2)])
def test_a_killed_finalize_leaves_nothing_final(where: str, calls: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    place = Place(str(tmp_path / "store")) if where == "folder" else request.getfixturevalue(where)
    store = filled(place.store())
    finalize(store, "fp32")
    command = [sys.executable, "-c", KILLED, place.url, place.endpoint_url or "", str(calls)]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    assert MANIFEST not in store.blobs.sizes()
    finalize(store)
    assert not list(tmp_path.rglob("*.tmp"))
    reference = files(store)
    store.clear()
    assert store.blobs.sizes() == {}
    finalize(filled(place.store()))
    assert files(store) == reference


def test_large_arrays_go_up_in_parts(bucket: Place, service: tuple[Service, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3, "_MOST_PARTS", 3)
    store = bucket.store()
    blocks = [torch.randn(4 if block < 2 else 2, 40, 20000) for block in BLOCKS]
    for block, part in enumerate(blocks):
        store.commit(block, {**tensors(block), "targets": part}, *BLOCKS[block])
    finalize(store)
    assert np.array_equal(array(store, tmp_path), torch.cat(blocks))


def test_an_upload_whose_last_answer_is_lost(bucket: Place, service: tuple[Service, str]) -> None:
    blobs = bucket.store().blobs
    with blobs.writing("array", 5) as write:
        write(b"12345")
        service[0].faults.extend(["", "lost", "404 NoSuchUpload"])
    assert blobs.get("array") == b"12345"


def test_an_upload_that_somebody_removed(bucket: Place, service: tuple[Service, str]) -> None:
    blobs = bucket.store().blobs

    def write_array() -> None:
        with blobs.writing("array", 5) as write:
            write(b"12345")
            service[0].faults.extend(["", "404 NoSuchUpload"])

    with pytest.raises(UserError, match=r"refused \(404: Not Found\)"):
        write_array()
    assert blobs.size("array") is None


def test_an_upload_that_fails_leaves_nothing(place: Place) -> None:
    blobs = place.store().blobs
    before = blobs.sizes()
    with suppress(KeyError), blobs.writing("array", 5) as write:
        write(b"123")
        raise KeyError
    assert blobs.sizes() == before


def test_compaction_takes_the_finalized_arrays(place: Place, tmp_path: Path) -> None:
    store = filled(place.store())
    finalize(store)
    whole = content(store, 1)
    store.blobs.put(name(1), flipped(whole, len(whole) - 9))
    compact(store, 3, tmp_path)
    assert {file: (tmp_path / file).read_bytes() for file in ARRAYS} == {file: files(store)[file] for file in ARRAYS}


@pytest.mark.parametrize("obstacle", ["damaged", "another dtype", "another store"])
def test_compaction_takes_the_shards_where_the_arrays_do_not_serve(
    place: Place, tmp_path: Path, obstacle: str, capfd: pytest.CaptureFixture
) -> None:
    store = filled(place.store())
    finalize(store, "fp32" if obstacle == "another dtype" else None)
    if obstacle == "damaged":
        store.blobs.put("targets.npy", flipped(store.blobs.get("targets.npy") or b"", 200))
    elif obstacle == "another store":
        manifest = {**json.loads(store.blobs.get(MANIFEST) or b""), "store": digest(OTHER)}
        del manifest["checksum"]
        store.blobs.put(MANIFEST, json.dumps({**manifest, "checksum": digest(manifest)}).encode())
    compact(store, 3, tmp_path)
    assert np.array_equal(np.load(tmp_path / "targets.npy"), np.concatenate([tensors(block)["targets"] for block in BLOCKS]))
    assert ("targets.npy is damaged; finalize it again; taking the shards" in capfd.readouterr().err) == (obstacle == "damaged")
