"""Where a store's files lie: a folder, or a prefix of a bucket. All write a file whole or not at all, and tell who came first."""

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from metadiff.errors import UserError

_BUCKETS = "s3://bucket/prefix or gs://bucket/prefix"
_UNSUITABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set store.url to a folder that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), f"set store.url to a folder, or to {_BUCKETS}"),
    **dict.fromkeys((errno.EOPNOTSUPP, errno.ENOSYS), f"set store.url to a file system with locks and hard links, or to {_BUCKETS}"),
}
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")


class StoreUnavailable(UserError):
    """The service does not answer, or answers with its own failure, however often asked: later it may again."""


class Blobs(Protocol):
    """Files by name, for several writers on several machines at once; picklable."""

    where: str
    """The place, for messages."""

    def prepare(self) -> None:
        """Make sure that the place is there and answers, and remove what killed writers left.

        Raises:
            UserError: it is not, does not, or may not be used.
        """
        ...

    def probe(self) -> None:
        """Make sure that the place is there and may be read; nothing is made or removed.

        Raises:
            UserError: it is not, or may not be.
        """
        ...

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """A file, or its bytes from `start` to before `stop`, as many as there are; None if there is no such file."""
        ...

    def size(self, name: str) -> int | None:
        """A file's size in bytes; None if there is none."""
        ...

    def put_new(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; False, and nothing written, if it is. Of several writers one succeeds."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a file, in one step replacing what is there."""
        ...

    def writing(self, name: str, size: int) -> AbstractContextManager[Callable[[bytes], object]]:
        """Write a file of `size` bytes piece by piece, in little memory.

        It is there, in one step replacing what was, when the block has ended, and not at all if it ended with an error.
        """
        ...

    def sizes(self) -> dict[str, int]:
        """The files and their sizes in bytes."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...


def open_blobs(url: str | Path, endpoint_url: str | None = None) -> Blobs:
    """What `url` means: a folder, `s3://bucket/prefix` or `gs://bucket/prefix`.

    Raises:
        UserError: it is none of them, or what the service needs is not installed or configured.
    """
    scheme, separator, rest = str(url).partition("://")
    if not separator:
        return FolderBlobs(Path(url))
    bucket, _, prefix = rest.partition("/")
    if scheme not in ("s3", "gs") or not bucket or "?" in rest:
        raise UserError(f"store.url={str(url)!r}: expected a folder, {_BUCKETS}; other services cannot be used yet")
    # Here, so that nobody needs the client of a service that is not used.
    if scheme == "s3":
        from distributed.s3 import S3Blobs as Service
    else:
        from distributed.gcs import GcsBlobs as Service
    return Service(bucket, prefix.strip("/"), endpoint_url)


class FolderBlobs:
    """A folder on a disk that all writers share.

    A file is written under another name and hard-linked into place, which fails if the name is taken. An exclusive lock on the
    temporary file shows that its writer lives: what is not locked was left by a killed one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, str(folder)

    def prepare(self) -> None:
        """See `Blobs`."""
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir():
                if _TEMPORARY.fullmatch(path.name):
                    _remove_if_abandoned(path)
            if not os.access(self.folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def probe(self) -> None:
        """See `Blobs`."""
        if not self.folder.is_dir() or not os.access(self.folder, os.R_OK | os.X_OK):
            raise UserError(f"store {self.where}: no folder that you may read; expected a store's folder, {_BUCKETS}")

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See `Blobs`."""
        with self._explained():
            try:
                with (self.folder / name).open("rb") as file:
                    file.seek(start)
                    return file.read(-1 if stop is None else stop - start)
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int | None:
        """See `Blobs`."""
        with self._explained():
            try:
                return (self.folder / name).stat().st_size
            except FileNotFoundError:
                return None

    def put_new(self, name: str, content: bytes) -> bool:
        """See `Blobs`."""
        with self._explained(), self._temporary(name) as file:
            file.write(content)
            _flush(file)
            try:
                os.link(file.name, self.folder / name)
            except FileExistsError:
                return False
            except PermissionError:
                # What may be written here but not linked lies on a file system without links.
                raise OSError(errno.EOPNOTSUPP, "no hard links here") from None
            _flush_folder(self.folder)
            return True

    def put(self, name: str, content: bytes) -> None:
        """See `Blobs`."""
        with self.writing(name, len(content)) as write:
            write(content)

    @contextmanager
    def writing(self, name: str, size: int) -> Iterator[Callable[[bytes], object]]:
        """See `Blobs`. The room is taken at once, so that a full disk is told before the work."""
        with self._explained(), self._temporary(name) as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
            yield file.write
            assert file.tell() == size, f"{name}: {file.tell()} bytes written, {size} announced"
            _flush(file)
            os.replace(file.name, self.folder / name)
            _flush_folder(self.folder)

    def sizes(self) -> dict[str, int]:
        """See `Blobs`."""
        with self._explained(), os.scandir(self.folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if not entry.name.endswith(".tmp") and entry.is_file()}

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        with self._explained():
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def _temporary(self, name: str) -> Iterator[BinaryIO]:
        with _locked(self.folder, name) as file:
            try:
                yield file
            finally:
                Path(file.name).unlink(missing_ok=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """One line for a folder that cannot serve; a full disk stays the OSError that it is, with a name."""
        try:
            yield
        except OSError as error:
            if error.errno in _UNSUITABLE:
                raise UserError(f"store {self.where}: {error.strerror}; {_UNSUITABLE[error.errno]}") from None
            error.filename = error.filename or self.where
            raise


def _locked(folder: Path, name: str) -> BinaryIO:
    """A new temporary file, held by this process."""
    while True:
        file = (folder / f"{name}.{uuid4().hex}.tmp").open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # Removed by another process before the lock held.


def _remove_if_abandoned(path: Path) -> None:
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
