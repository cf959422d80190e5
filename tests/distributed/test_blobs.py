"""Writers that race and die, and disks that fail."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed.blobs import FolderBlobs, open_blobs
from distributed.identity import IDENTITY
from distributed.store import TargetStore
from metadiff.errors import UserError
from tests.distributed.stores import BLOCKS, MINE, OTHER, Place, commit, content, filled, name, raising, same

ROOT = Path(__file__).parents[2]
RACERS = 8


@pytest.mark.parametrize("url", ["abfs://bucket/store", "s3://", "gs://", "s3:///prefix", "http://host/store", "s3://bucket/p?region=eu"])
def test_other_services_are_refused(url: str) -> None:
    with pytest.raises(UserError, match=r"store\.url='.*': expected a folder, s3://bucket/prefix or gs://bucket/prefix;"):
        open_blobs(url)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """`work(0)` to `work(RACERS - 1)` in threads that start together."""
    barrier = threading.Barrier(RACERS)

    def run(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(RACERS) as pool:
        return list(pool.map(run, range(RACERS)))


def test_one_of_racing_threads_wins(place: Place) -> None:
    stores = [place.store() for _ in range(RACERS)]
    for attempt in range(5):
        won = at_once(lambda i, attempt=attempt: stores[i].blobs.put_new(f"race-{attempt}", b"%d" % i * 1000))
        assert sum(won) == 1
        assert stores[0].blobs.get(f"race-{attempt}") == b"%d" % won.index(True) * 1000
    assert sum(at_once(lambda i: commit(stores[i], 0))) == 1
    assert same(stores[0].read(0), 0)


def test_one_of_racing_processes_wins(place: Place, tmp_path: Path) -> None:
    script = """if True:
        import pathlib, sys, time
        from concurrent.futures import ThreadPoolExecutor
        from distributed.blobs import open_blobs
        url, endpoint, ready, go = sys.argv[1:]
        blobs = open_blobs(url, endpoint or None)
        pathlib.Path(ready).touch()
        while not pathlib.Path(go).exists():
            time.sleep(0.001)
        with ThreadPoolExecutor(4) as pool:
            for race in range(5):
                print(sum(pool.map(lambda thread: blobs.put_new(f"race-{race}", b"%d" % thread * 10000), range(4))))
    """
    store, go = place.store(), tmp_path / "go"
    ready = [tmp_path / f"ready-{number}" for number in range(RACERS // 4)]
    command = [sys.executable, "-c", script, place.url, place.endpoint_url or ""]
    racers = [subprocess.Popen([*command, path, go], cwd=ROOT, stdout=subprocess.PIPE, text=True) for path in ready]
    while not all(path.exists() for path in ready):
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    go.touch()
    wins = np.array([racer.communicate()[0].split() for racer in racers], dtype=int)
    assert wins.sum(0).tolist() == [1] * 5
    assert all(store.blobs.sizes()[f"race-{race}"] == 10000 for race in range(5))


def test_one_of_two_configurations_gets_the_place(place: Place) -> None:
    def attempt(number: int) -> bool:
        try:
            place.store([MINE, OTHER][number % 2])
        except UserError:
            return False
        return True

    got = at_once(attempt)
    assert got in ([True, False] * (RACERS // 2), [False, True] * (RACERS // 2))


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_kill_in_a_commit_leaves_nothing_half(tmp_path: Path, step: str) -> None:
    reference = filled(TargetStore.open(tmp_path / "whole", MINE))
    store = TargetStore.open(tmp_path / "store", MINE)
    script = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from distributed.blobs import FolderBlobs
        os.{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        FolderBlobs(Path(sys.argv[1])).put_new("{name(0)}", sys.stdin.buffer.read())
    """
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    assert subprocess.run(command, cwd=ROOT, input=content(reference, 0)).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "store").glob("*.tmp"))) == 1
    assert store.missing(3) == [0, 1, 2]
    assert set(store.blobs.sizes()) == {IDENTITY}
    again = filled(TargetStore.open(tmp_path / "store", MINE))
    assert list((tmp_path / "store").glob("*.tmp")) == []
    assert [content(again, block) for block in BLOCKS] == [content(reference, block) for block in BLOCKS]


def test_the_file_of_a_living_writer_and_of_others_stays(tmp_path: Path) -> None:
    store = TargetStore.open(tmp_path, MINE)
    (tmp_path / "theirs.tmp").touch()
    with (tmp_path / f"{name(0)}.{'0' * 32}.tmp").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        store.blobs.prepare()
        assert Path(file.name).exists()
    store.blobs.prepare()
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["theirs.tmp"]


def test_a_temporary_file_that_was_removed_before_its_lock_held_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, flock, removed = TargetStore.open(tmp_path, MINE), fcntl.flock, []

    def late(file: Any, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob("*.tmp"))
            removed[0].unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert commit(store, 0)
    assert same(store.read(0), 0)


@pytest.mark.parametrize("call", ["link", "fsync"])
def test_a_full_disk_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    store = TargetStore.open(tmp_path, MINE)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match=r"No space left") as caught:
            commit(store, 0)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert set(os.listdir(tmp_path)) == {IDENTITY}
    assert commit(store, 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EACCES, r"Permission denied; set store\.url to a folder that you may write to"),
        (errno.EROFS, r"Read-only file system; set store\.url to a folder that you may write to"),
    ],
)
def test_a_folder_without_permission_is_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    monkeypatch.setattr(Path, "mkdir", raising(OSError(code, os.strerror(code))))
    with pytest.raises(UserError, match=message):
        TargetStore.open(tmp_path / "store", MINE)


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"Permission denied; set store\.url"):
        TargetStore.open(tmp_path, MINE)


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", raising(PermissionError(errno.EPERM, "Operation not permitted")))
    with pytest.raises(UserError, match=r"no hard links here; set store\.url to a file system with"):
        TargetStore.open(tmp_path, MINE)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("inside", [".", "store"])
def test_a_file_in_the_folders_place(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"store .*file.*: .*; set store\.url to a folder, or to s3://"):
        TargetStore.open(tmp_path / "file" / inside, MINE)


def test_folder_blobs_read_no_more_than_asked(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    blobs.put("file", b"0123456789")
    assert blobs.get("file", stop=4) == b"0123"
    assert blobs.get("none", stop=4) is None
