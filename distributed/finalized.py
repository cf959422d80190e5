"""A finalized store: arrays of all tasks beside the shards, and the manifest, written last, that says what they hash to."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.ahead import ahead
from distributed.blobs import Blobs
from metadiff.artifact import digest
from metadiff.errors import UserError

MANIFEST = "manifest.json"
_PIECE_BYTES = 8 * 2**20


class DamagedArray(UserError):
    """A finalized array is missing, truncated or altered."""


@dataclass(frozen=True)
class Finalized:
    """A finalized store's arrays.

    Attributes:
        blobs: where they lie.
        manifest: see `finalize`.
    """

    blobs: Blobs
    manifest: Mapping[str, Any]

    @classmethod
    def read(cls, blobs: Blobs, store: str) -> "Finalized | None":
        """What the manifest says; None where there is none, or it is damaged or of another store than the one with the hash `store`."""
        try:
            manifest = json.loads(blobs.get(MANIFEST) or b"")
            checksum = digest({key: value for key, value in manifest.items() if key != "checksum"})
            return cls(blobs, manifest) if (manifest["checksum"], manifest["store"]) == (checksum, store) else None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def content(self) -> str:
        """The hash of all arrays."""
        return self.manifest["content"]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """The arrays' names, with their `bytes` and `sha256`."""
        return self.manifest["arrays"]

    @property
    def converted(self) -> bool:
        """Whether the targets have another dtype than in the shards."""
        return self.manifest["dtype"] != self.manifest["shard_dtype"]

    def has_sizes(self, sizes: Mapping[str, int]) -> bool:
        """Whether the files of these `sizes` are as large as the manifest says."""
        return all(sizes.get(name) == entry["bytes"] for name, entry in self.files.items())

    def is_intact(self, name: str) -> bool:
        """Whether an array is what the manifest says: it is read."""
        try:
            for _ in self._pieces(name):
                pass
        except DamagedArray:
            return False
        return True

    def copy(self, name: str, path: Path) -> None:
        """Write an array into the file `path`, whose room on the disk is taken at once.

        Raises:
            DamagedArray: it is not what the manifest says; what is written is worthless.
            OSError: no space left.
        """
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, self.files[name]["bytes"])
            for piece in self._pieces(name):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    def _pieces(self, name: str) -> Iterator[bytes]:
        """An array in pieces; at the end it is an error if they do not match the checksum."""
        size, seen = self.files[name]["bytes"], hashlib.sha256()
        starts = range(0, size, _PIECE_BYTES)
        for piece in ahead(lambda start: self.blobs.get(name, start, min(start + _PIECE_BYTES, size)) or b"", starts):
            seen.update(piece)
            yield piece
        if seen.hexdigest() != self.files[name]["sha256"] or self.blobs.size(name) != size:
            raise DamagedArray(f"store {self.blobs.where}: {name} is damaged; finalize it again")
