"""`python -m distributed.store`, as a user types it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.identity import IDENTITY
from distributed.shard import pack
from distributed.store import TargetStore
from distributed.store_command import main
from metadiff.artifact import digest
from tests.distributed.stores import BLOCKS, MINE, OTHER, Place, commit, content, filled, flipped, name, tensors
from tests.refusal import only_error

ROOT = Path(__file__).parents[2]
FIT = "run python -m distributed.fit_targets"


def run(action: str, place: Place, *options: str) -> int:
    endpoint = ["--endpoint-url", place.endpoint_url] if place.endpoint_url else []
    return main([action, place.url, *endpoint, *options])


def lines(capfd: pytest.CaptureFixture) -> dict[str, str]:
    """What is printed, by its first word."""
    return {line.split()[0]: " ".join(line.split()[1:]) for line in capfd.readouterr().out.splitlines()}


@pytest.mark.parametrize("action", ["stat", "verify"])
def test_a_whole_store(place: Place, action: str, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    assert run(action, place) == 0
    found = lines(capfd)
    assert found["store"] == store.blobs.where
    assert (found["tasks"], found["blocks"].split(",")[0]) == ("10 of 10", "3 of 3")
    assert (found["missing"], found["damaged"], found["foreign"], found["finalized"]) == ("none", "none", "none", "no")
    for word in ("targets.kind=ce", "targets.tolerance=1e-05", "targets.num_tasks=10", "store.block=4"):
        assert word in found["made"].split()
    assert found["features"] == "f" * 64
    assert found["whole:" if action == "verify" else "whole,"]


def test_what_is_missing_damaged_and_foreign_is_told(place: Place, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    store.discard(0)
    store.blobs.put(name(1), content(store, 1)[:-2])
    store.blobs.put(name(7), content(store, 2))
    store.blobs.put("notes.txt", b"mine")
    for action in ("stat", "verify"):
        assert run(action, place) == 1
        shown = capfd.readouterr()
        assert "tasks      2 of 10\n" in shown.out
        assert "missing    1 block: 0\ndamaged    1 block: 1\n" in shown.out
        assert f"  block 1 has {len(content(store, 1))} bytes, its header says {len(content(store, 1)) + 2}\n" in shown.out
        assert f"foreign    2\n  {name(7)}\n  notes.txt\n" in shown.out
        assert f"not whole: run python -m distributed.store verify --delete-damaged {place.url}" in shown.err
        assert f", then {FIT[4:]}" in shown.err


def test_only_verify_sees_a_flipped_byte(place: Place, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    store.blobs.put(name(2), flipped(content(store, 2), len(content(store, 2)) - 5))
    assert run("stat", place) == 0
    assert run("verify", place) == 1
    assert "  block 2 does not match its checksum\n" in capfd.readouterr().out


def test_another_stores_shard_is_told(place: Place, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    store.blobs.put(name(1), pack(digest(OTHER), 1, 4, 7, tensors(1)))
    for action in ("stat", "verify"):
        assert run(action, place) == 1
        assert "  block 1 belongs to another store or block\n" in capfd.readouterr().out


def test_damaged_shards_are_deleted_and_fitted_again(place: Place, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    whole = {block: content(store, block) for block in BLOCKS}
    store.blobs.put(name(1), flipped(whole[1], len(whole[1]) - 5))
    assert run("verify", place, "--delete-damaged") == 1
    said = capfd.readouterr().err
    assert "deleted: 1 damaged shards\n" in said
    assert f"not whole: {FIT}" in said
    assert store.missing(3) == [1]
    assert commit(store, 1)
    assert run("verify", place) == 0
    assert {block: content(store, block) for block in BLOCKS} == whole


def test_finalized_arrays_are_verified_too(place: Place, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    assert run("finalize", place, "--dtype", "fp32") == 0
    assert "targets.npy" in capfd.readouterr().out
    assert run("verify", place) == 0
    assert lines(capfd)["finalized"].startswith("fp32, ")
    array = store.blobs.get("targets.npy") or b""
    store.blobs.put("targets.npy", flipped(array, 200))
    assert run("stat", place) == 0
    assert run("verify", place) == 1
    shown = capfd.readouterr()
    assert "  targets.npy does not match its checksum\n" in shown.out
    assert f"not whole: run python -m distributed.store finalize {place.url}" in shown.err
    assert run("verify", place, "--delete-damaged") == 1
    assert run("stat", place) == 0
    assert run("finalize", place, "--dtype", "fp32") == 0
    assert store.blobs.get("targets.npy") == array


def test_an_incomplete_store_is_not_finalized(place: Place, capfd: pytest.CaptureFixture) -> None:
    store = filled(place.store())
    store.discard(1)
    assert run("finalize", place) == 1
    only_error(capfd, "1 of 3 blocks are not there", FIT)


def test_an_empty_folder(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for action in ("stat", "verify", "finalize"):
        assert main([action, str(tmp_path)]) == 2
        only_error(capfd, str(tmp_path), "there is none", "check the URL")
    assert list(tmp_path.iterdir()) == []


def test_no_folder_at_all(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "file").touch()
    for place in ("nowhere", "file"):
        assert main(["stat", str(tmp_path / place)]) == 2
        only_error(capfd, str(tmp_path / place), "no folder that you may read")
    assert not (tmp_path / "nowhere").exists()


def test_shards_without_the_stores_own_file(place: Place, capfd: pytest.CaptureFixture) -> None:
    filled(place.store()).blobs.delete(IDENTITY)
    assert run("stat", place) == 2
    only_error(capfd, f"no {IDENTITY}", "start their fit again, which writes that file anew")
    assert place.store().missing(3) == []


def test_a_store_of_another_format(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    identity = {**MINE, "format": 2}
    (tmp_path / IDENTITY).write_text(json.dumps({"identity": identity, "checksum": digest(identity)}))
    assert main(["verify", str(tmp_path)]) == 2
    only_error(capfd, "has format 2, this version reads format 1; use the version that made it")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("required", "--help")),
        (["look", "store"], ("look", "stat", "--help")),
        (["stat"], ("URL", "--help")),
        (["finalize", "store", "--dtype", "fp8"], ("fp8", "fp16", "fp32")),
        (["stat", "abfs://bucket/store"], ("abfs://bucket/store", "expected a folder, s3://bucket/prefix or gs://bucket/prefix")),
    ],
)
def test_what_is_typed_wrong(arguments: list[str], words: tuple[str, ...], capfd: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    only_error(capfd, *words)


def test_a_folder_that_may_only_be_read(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(TargetStore.open(tmp_path, MINE))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and access(path, mode))
    assert main(["verify", str(tmp_path)]) == 0


def test_the_command_runs_by_itself(tmp_path: Path) -> None:
    filled(TargetStore.open(tmp_path, MINE))
    command = [sys.executable, "-W", "error", "-m", "distributed.store"]
    done = subprocess.run([*command, "stat", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "blocks     3 of 3" in done.stdout


def test_an_interrupt(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(TargetStore.open(tmp_path, MINE))

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TargetStore, "unpacked", interrupted)
    assert main(["finalize", str(tmp_path)]) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "interrupted; nothing is half done, start again"
    assert set(os.listdir(tmp_path)) == {IDENTITY, *map(name, BLOCKS)}
