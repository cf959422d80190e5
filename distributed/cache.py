"""Copies of finished arrays on a node's own disk: one a node, whole or not there, made by the first process that asks."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from distributed.finalized import Finalized
from distributed.store import TargetStore
from metadiff.artifact import digest, sha256, write_atomically
from metadiff.errors import UserError

_RECORD = "copied.json"
_SEEN = "seen.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PIECE_BYTES = 8 * 2**20


def fetch(url: str | Path, cache: Path, endpoint_url: str | None = None) -> Path:
    """The folder with this node's copy of a finalized store's arrays, `<cache>/<content hash>/`.

    Raises:
        UserError: the store is not finalized, or one of its arrays is damaged; or the cache cannot be used.
    """
    store = TargetStore.find(url, endpoint_url)
    finalized = Finalized.read(store.blobs, store.identity_hash)
    if finalized is None:
        raise UserError(f"store {store.blobs.where}: is not finalized; run python -m distributed.store finalize {url}")
    return _obtain(cache, finalized.content, {name: entry["bytes"] for name, entry in finalized.files.items()}, finalized.copy)


def local_copy(artifact_files: Mapping[str, Path], content: str, cache: Path) -> Path:
    """The folder with this node's copy of files on a shared disk, `<cache>/<content>/`; `content` is their hash, or their artifact's.

    Raises:
        UserError: the cache cannot be used.
        OSError: a file is not there.
    """

    def copy(name: str, path: Path) -> None:
        with artifact_files[name].open("rb") as source, path.open("wb") as target:
            os.posix_fallocate(target.fileno(), 0, os.fstat(source.fileno()).st_size)
            shutil.copyfileobj(source, target, _PIECE_BYTES)
            target.flush()
            os.fsync(target.fileno())

    return _obtain(cache, content, {name: path.stat().st_size for name, path in artifact_files.items()}, copy)


def _obtain(cache: Path, content: str, sizes: Mapping[str, int], copy: Callable[[str, Path], None]) -> Path:
    """The cached folder of this content, made or made anew where it is not whole; `copy` writes one file to a path."""
    with _explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        folder = cache / content
        with _locked(cache / f"{content}.lock"):
            if not _is_whole(folder, sizes):
                _make(folder, sizes, copy)
    return folder


def _make(folder: Path, sizes: Mapping[str, int], copy: Callable[[str, Path], None]) -> None:
    # Whoever holds the lock is alone: what is left of others was killed.
    for left in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(left)
    new, old = (folder.with_name(f"{folder.name}.{uuid4().hex}.tmp") for _ in range(2))
    new.mkdir()
    try:
        for name in sizes:
            copy(name, new / name)
        files = {name: {"bytes": size, "sha256": sha256(new / name)} for name, size in sizes.items()}
        write_atomically(new / _RECORD, json.dumps({"files": files, "checksum": digest(files)}).encode())
        _note(new, files)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether the copy is what was copied. It is read once after every start of the machine, and whenever a file seems touched."""
    files = _read(folder / _RECORD)
    if digest(files.get("files")) != files.get("checksum"):
        return False
    files = files["files"]
    if {name: entry["bytes"] for name, entry in files.items()} != sizes or not all((folder / name).is_file() for name in files):
        return False
    if _read(folder / _SEEN) != _state(folder, files):
        if any(sha256(folder / name) != entry["sha256"] for name, entry in files.items()):
            return False
        _note(folder, files)
    return True


def _note(folder: Path, files: Mapping[str, Any]) -> None:
    write_atomically(folder / _SEEN, json.dumps(_state(folder, files)).encode())


def _state(folder: Path, files: Mapping[str, Any]) -> dict[str, Any]:
    """By what a file would be noticed that changed behind our back."""
    stats = {name: (folder / name).stat() for name in files}
    boot = _BOOT.read_text() if _BOOT.exists() else ""
    return {"boot": boot, "files": {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _explained(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "free some room there, or set store.cache to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            advice = "set store.cache to a folder that you may write to"
        else:
            raise
        raise UserError(f"store.cache={cache}: {error.strerror}; {advice}") from None
