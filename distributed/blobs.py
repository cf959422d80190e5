"""Where a store's files lie: a folder, or a prefix of an S3 bucket. Both write a file whole or not at all, and tell who came first."""

import errno
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from uuid import uuid4

from metadiff.errors import UserError

_UNSUITABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set store.url to a folder that you may write to"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "set store.url to a folder, or to s3://bucket/prefix"),
    **dict.fromkeys((errno.EOPNOTSUPP, errno.ENOSYS), "set store.url to a file system with locks and hard links, or to s3://bucket/prefix"),
}
_TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")


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

    def get(self, name: str, limit: int | None = None) -> bytes | None:
        """A file, or its first `limit` bytes; None if there is none."""
        ...

    def put_new(self, name: str, content: bytes) -> bool:
        """Write a file that is not there yet; False, and nothing written, if it is. Of several writers one succeeds."""
        ...

    def put(self, name: str, content: bytes) -> None:
        """Write a file, in one step replacing what is there."""
        ...

    def sizes(self) -> dict[str, int]:
        """The files and their sizes in bytes."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...


def open_blobs(url: str | Path, endpoint_url: str | None = None) -> Blobs:
    """What `url` means: a folder or `s3://bucket/prefix`.

    Raises:
        UserError: it is neither, or what S3 needs is not installed or configured.
    """
    scheme, separator, rest = str(url).partition("://")
    if not separator:
        return FolderBlobs(Path(url))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket or "?" in rest:
        raise UserError(f"store.url={str(url)!r}: expected a folder or s3://bucket/prefix; other services cannot be used yet")
    from distributed.s3 import S3Blobs

    return S3Blobs(bucket, prefix.strip("/"), endpoint_url)


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

    def get(self, name: str, limit: int | None = None) -> bytes | None:
        """See `Blobs`."""
        with self._explained():
            try:
                with (self.folder / name).open("rb") as file:
                    return file.read(-1 if limit is None else limit)
            except FileNotFoundError:
                return None

    def put_new(self, name: str, content: bytes) -> bool:
        """See `Blobs`."""
        with self._explained(), self._temporary(name, content) as temporary:
            try:
                os.link(temporary, self.folder / name)
            except FileExistsError:
                return False
            except PermissionError:
                # What may be written here but not linked lies on a file system without links.
                raise OSError(errno.EOPNOTSUPP, "no hard links here") from None
            _flush_folder(self.folder)
            return True

    def put(self, name: str, content: bytes) -> None:
        """See `Blobs`."""
        with self._explained(), self._temporary(name, content) as temporary:
            temporary.replace(self.folder / name)
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
    def _temporary(self, name: str, content: bytes) -> Iterator[Path]:
        with _locked(self.folder, name) as file:
            path = Path(file.name)
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                yield path
            finally:
                path.unlink(missing_ok=True)

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


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
