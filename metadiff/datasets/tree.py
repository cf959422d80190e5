"""Where image files lie: a folder, or a zip read in place; listed folder by folder, read one file at a time."""

import io
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from metadiff.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")


class FileTree(ABC):
    """Files below `root`. A path is `root` and what follows it, so that it names the file to a person as it stands."""

    root: str

    @abstractmethod
    def entries(self, at: str) -> dict[str, bool]:
        """The names in the folder `at`, each with whether it is a folder; none where there is no such folder."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """The content of one file.

        Raises:
            OSError: it is missing, damaged, or may not be read.
        """

    def folders(self, at: str) -> list[str]:
        """The sorted names of the folders in the folder `at`, hidden ones left out."""
        return sorted(name for name, is_folder in self.entries(at).items() if is_folder and not _hidden(name))

    def files(self, at: str) -> list[str]:
        """The sorted names of the files in the folder `at`, hidden ones left out."""
        return sorted(name for name, is_folder in self.entries(at).items() if not is_folder and not _hidden(name))

    def images(self, at: str) -> list[str]:
        """The sorted paths of the files in the folder `at` that have an image's suffix."""
        return [f"{at}/{name}" for name in self.files(at) if name.lower().endswith(IMAGE_SUFFIXES)]

    def top(self, *names: str) -> str | None:
        """The root, or the one folder in it: whichever has one of `names` in it (`name` a file, `name/` a folder); None if neither has."""
        inner = self.folders(self.root)
        tops = [self.root, f"{self.root}/{inner[0]}"] if len(inner) == 1 else [self.root]
        return next((top for top in tops if {*names} & {*self.files(top), *(f"{name}/" for name in self.folders(top))}), None)

    def text(self, path: str) -> str:
        """A text file's content.

        Raises:
            UserError: it cannot be read, or is not UTF-8.
        """
        try:
            return self.read(path).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text ({error}); fetch the file again") from None

    def open_image(self, path: str) -> Image.Image:
        """The image at `path`, whole and as RGB.

        Raises:
            OSError: it cannot be read, or is no image, or is cut short.
        """
        return decode_rgb(self.read(path), path)


class FolderTree(FileTree):
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def entries(self, at: str) -> dict[str, bool]:
        """Listed anew at each call, links followed."""
        try:
            with os.scandir(at) as listing:
                return {entry.name: entry.is_dir() for entry in listing}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"{at}: cannot be listed ({error.strerror}); make the folder readable") from None

    def read(self, path: str) -> bytes:
        """The file's bytes, or the system's OSError."""
        return Path(path).read_bytes()


class ZipTree(FileTree):
    """The files in a zip, read without unpacking it. It can be pickled and survives a fork.

    Raises:
        UserError: it is damaged, or a member's name climbs out of it.
    """

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self._open()
        self._entries: defaultdict[str, dict[str, bool]] = defaultdict(dict)
        self._members = {str(PurePosixPath(root, member)): member for member in self._zip.namelist()}
        for member in self._members.values():
            self._add(member)

    def __reduce__(self) -> tuple[type["ZipTree"], tuple[Path]]:
        return ZipTree, (Path(self.root),)

    def entries(self, at: str) -> dict[str, bool]:
        """From the zip's own list of members."""
        return self._entries.get(at, {})

    def read(self, path: str) -> bytes:
        """The member's bytes, or OSError for whatever is wrong with it."""
        # Processes forked from one another share the handle's position in the file, and would read each other's members.
        if self._process != os.getpid():
            self._open()
        try:
            return self._zip.read(self._members[path])
        # For a missing, damaged, cut, unknown to Python, and encrypted member, in this order.
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"{path}: cannot be read from the zip ({error})") from None

    def _open(self) -> None:
        try:
            self._zip, self._process = zipfile.ZipFile(self.root), os.getpid()
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.root}: not a readable zip ({error}); it is damaged or cut short: fetch it again") from None

    def _add(self, member: str) -> None:
        if member.startswith(("/", "\\")) or re.match("[A-Za-z]:", member) or ".." in re.split(r"[/\\]", member):
            raise UserError(
                f"{self.root}: refused, its member {member!r} would be unpacked outside of its folder; fetch it from its origin"
            )
        path, is_folder = PurePosixPath(self.root, member), member.endswith("/")
        while str(path) != self.root and path.name not in self._entries[str(path.parent)]:
            self._entries[str(path.parent)][path.name] = is_folder
            path, is_folder = path.parent, True


def open_tree(root: Path, expected: str) -> FileTree:
    """The files of the folder or zip `root`; `expected` says in an error what should be there and where to get it.

    Raises:
        UserError: it is missing, is neither, or is a zip that is damaged or unsafe.
    """
    root = root.expanduser()
    if root.is_dir():
        return FolderTree(root)
    if not root.exists():
        raise UserError(f"{root}: no such folder or zip; {expected}")
    if root.suffix.lower() != ".zip":
        raise UserError(f"{root}: neither a folder nor a .zip; {expected}")
    return ZipTree(root)


def decode_rgb(content: bytes, name: str) -> Image.Image:
    """The image file `content` decoded to its end, as RGB of 8 bits.

    Raises:
        OSError: it is no image, is cut short or damaged, or has pixels of 32 bits; `name` says which.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _to_rgb(image)
    # What Pillow's decoders raise for damaged files, besides OSError.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(f"{name}: not a readable image ({error})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, whose range is unknown: save it with 8 or 16")
    if image.mode.startswith("I;16"):
        # Pillow would cut every value above 255 to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    # A palette goes by way of RGBA, else Pillow warns of its transparency.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
