"""One copy of the arrays on each node."""

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from distributed import cache as caching
from distributed.cache import fetch, local_copy
from distributed.finalize import finalize
from distributed.finalized import Finalized
from metadiff.errors import UserError
from tests.distributed.stores import BLOCKS, Place, filled, flipped, raising, tensors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arrays that are read from the store, one entry a time."""
    found: list[str] = []
    copy = Finalized.copy

    def counted(self: Finalized, name: str, path: Path) -> None:
        found.append(name)
        copy(self, name, path)

    monkeypatch.setattr(Finalized, "copy", counted)
    return found


@pytest.fixture
def folder_store(tmp_path: Path) -> Place:
    place = Place(str(tmp_path / "store"))
    finalize(filled(place.store()))
    return place


def everything(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def test_what_is_fetched_is_what_was_fitted(place: Place, tmp_path: Path, reads: list[str]) -> None:
    finalized = finalize(filled(place.store()))
    folder = fetch(place.url, tmp_path / "cache" / "deep", place.endpoint_url)
    assert folder == tmp_path / "cache" / "deep" / finalized.content
    arrays = everything(folder)
    assert sorted(arrays) == ["classes.npy", "diagnostics.npy", "targets.npy"]
    for key in ("targets", "classes"):
        assert np.array_equal(arrays[f"{key}.npy"], np.concatenate([tensors(block)[key] for block in BLOCKS]))
    assert fetch(place.url, tmp_path / "cache" / "deep", place.endpoint_url) == folder
    assert sorted(reads) == sorted(arrays)


def test_processes_that_ask_at_once_share_one_copy(folder_store: Place, tmp_path: Path, reads: list[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(folder_store.url, tmp_path / "cache"), range(4)))
    assert len(folders) == 1
    assert len(reads) == 3


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "record gone", "record edited"])
def test_a_damaged_copy_is_replaced(folder_store: Place, tmp_path: Path, damage: str) -> None:
    folder = fetch(folder_store.url, tmp_path / "cache")
    target, whole = folder / "targets.npy", (folder / "targets.npy").read_bytes()
    match damage:
        case "flipped":
            target.write_bytes(flipped(whole, 200))
        case "truncated":
            target.write_bytes(whole[:-1])
        case "missing":
            target.unlink()
        case "record gone":
            (folder / "copied.json").unlink()
        case _:
            (folder / "copied.json").write_text("[]")
    assert fetch(folder_store.url, tmp_path / "cache") == folder
    assert target.read_bytes() == whole
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_copy_is_read_again_after_the_machine_has_started_again(
    folder_store: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(folder_store.url, tmp_path / "cache")
    target = folder / "targets.npy"
    whole, before = target.read_bytes(), target.stat()
    target.write_bytes(flipped(whole, 200))
    # A disk that loses a bit does not tell the time.
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    fetch(folder_store.url, tmp_path / "cache")
    assert target.read_bytes() != whole
    monkeypatch.setattr(caching, "_BOOT", tmp_path / "none")
    fetch(folder_store.url, tmp_path / "cache")
    assert target.read_bytes() == whole


def test_a_killed_copy_leaves_nothing_that_counts(folder_store: Place, tmp_path: Path) -> None:
    script = """if True:
        import os, pathlib, signal, sys
        from distributed import cache
        cache.digest = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        cache._is_whole = lambda *_: False
        cache.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))
    """
    command = [sys.executable, "-c", script, folder_store.url, str(tmp_path / "cache")]
    assert subprocess.run(command, cwd=ROOT).returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".tmp"]
    assert len(left) == 1
    folder = fetch(folder_store.url, tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_store_that_is_not_finalized(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "store"))
    filled(place.store())
    with pytest.raises(UserError, match=r"is not finalized; run python -m distributed\.store finalize"):
        fetch(place.url, tmp_path / "cache")


def test_a_damaged_array_in_the_store_is_told(folder_store: Place, tmp_path: Path) -> None:
    array = Path(folder_store.url, "targets.npy")
    array.write_bytes(flipped(array.read_bytes(), 200))
    with pytest.raises(UserError, match=r"targets\.npy is damaged; finalize it again"):
        fetch(folder_store.url, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_full_disk(folder_store: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=r"store\.cache=.*: No space left on device; free some room there, or set store\.cache to another"):
        fetch(folder_store.url, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_is_a_file(folder_store: Place, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"store\.cache=.*; set store\.cache to a folder that you may write to"):
        fetch(folder_store.url, tmp_path / "cache")


def test_files_on_a_shared_disk_are_copied_too(tmp_path: Path) -> None:
    files = {name: tmp_path / f"shared-{name}" for name in ("targets.npy", "classes.npy")}
    for number, path in enumerate(files.values()):
        np.save(path, np.arange(number, 5))
    folder = local_copy(files, "c0ffee", tmp_path / "cache")
    assert folder == tmp_path / "cache" / "c0ffee"
    assert {name: array.tolist() for name, array in everything(folder).items()} == {
        "targets.npy": [0, 1, 2, 3, 4],
        "classes.npy": [1, 2, 3, 4],
    }
    (folder / "targets.npy").write_bytes(b"")
    assert (local_copy(files, "c0ffee", tmp_path / "cache") / "targets.npy").read_bytes() == files["targets.npy"].read_bytes()
