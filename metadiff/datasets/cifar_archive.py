"""The python archive of CIFAR-100 (Krizhevsky 2009): two pickled batches of images and the names of the classes."""

import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metadiff.errors import UserError

ORIGIN = "cs.toronto.edu/~kriz/cifar.html"
FOLDER = "cifar-100-python"
BATCHES = ("train", "test")
FILES = (*BATCHES, "meta")


@dataclass(frozen=True)
class CifarArchive:
    """All of CIFAR-100, in memory.

    Attributes:
        root: where it was found.
        pixels: (n, 32, 32, 3) uint8 of each batch, `train` and `test`.
        filenames: n names of each batch, as its makers gave them.
        images: the (batch, index) of the images of each class.
    """

    root: Path
    pixels: dict[str, np.ndarray]
    filenames: dict[str, list[str]]
    images: dict[str, list[tuple[str, int]]]

    def name(self, image: tuple[str, int]) -> str:
        """Where an image lies."""
        batch, index = image
        return f"{self.root}/{batch}: {self.filenames[batch][index]}"

    def open(self, image: tuple[str, int]) -> Image.Image:
        """An image, 32 x 32."""
        batch, index = image
        return Image.fromarray(self.pixels[batch][index])


def find_archive(root: Path) -> CifarArchive | None:
    """The archive that `root` is or holds, packed or not; None where there is none.

    Raises:
        UserError: it is damaged, or is not CIFAR-100.
    """
    for folder in (root / FOLDER, root):
        if (folder / "meta").is_file():
            return _checked(folder, _read_folder)
    for path in (root / f"{FOLDER}.tar.gz", root):
        if path.is_file() and path.name.endswith(".tar.gz"):
            return _checked(path, _read_packed)
    return None


def _checked(path: Path, read: Callable[[Path], dict[str, bytes]]) -> CifarArchive:
    try:
        return _parse(path, read(path))
    # A damaged archive can make unpickling raise anything.
    except Exception as error:
        raise UserError(
            f"{path}: not the python archive of CIFAR-100 ({error or type(error).__name__}); fetch it again from {ORIGIN}"
        ) from None


def _read_folder(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


def _read_packed(path: Path) -> dict[str, bytes]:
    contents = {}
    with tarfile.open(path) as packed:
        for member in packed:
            folder, _, name = member.name.rpartition("/")
            file = packed.extractfile(member)
            if folder == FOLDER and name in FILES and file:
                contents[name] = file.read()
    return contents


def _parse(path: Path, contents: Mapping[str, bytes]) -> CifarArchive:
    missing = [name for name in FILES if name not in contents]
    if missing:
        raise ValueError(f"no {missing[0]} in it")
    classes = [name.decode() for name in _unpickle(contents["meta"])[b"fine_label_names"]]
    archive = CifarArchive(path, {}, {}, {name: [] for name in classes})
    for batch in BATCHES:
        fields = _unpickle(contents[batch])
        archive.pixels[batch] = fields[b"data"].pixels()
        archive.filenames[batch] = [name.decode() for name in fields[b"filenames"]]
        for index, (label, _, _) in enumerate(zip(fields[b"fine_labels"], archive.filenames[batch], archive.pixels[batch], strict=True)):
            archive.images[classes[label]].append((batch, index))
    return archive


def _unpickle(content: bytes) -> dict[bytes, Any]:
    # Written by Python 2, whose strings are bytes.
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


class _Unpickler(pickle.Unpickler):
    """Makes plain values and arrays of bytes and nothing else: a pickle can name any function of Python's to be called."""

    def find_class(self, module: str, name: str) -> type:
        stand_in = STAND_INS.get((module.replace("_core", "core"), name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-100 never does: do not trust it")
        return stand_in


class _Dtype:
    """What numpy.dtype was pickled as."""

    def __init__(self, code: bytes, *_: object) -> None:
        if code != b"u1":
            raise pickle.UnpicklingError(f"an array of type {code!r}, expected u1")

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """What numpy.ndarray was pickled as: its shape, its order, and its bytes."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, self.shape, _, self.is_fortran, self.content = state

    def pixels(self) -> np.ndarray:
        """(n, 32, 32, 3) from (n, 3072), whose rows hold the red, the green, and the blue plane."""
        rows = np.frombuffer(self.content, np.uint8).reshape(self.shape, order="F" if self.is_fortran else "C")
        return rows.reshape(len(rows), 3, 32, 32).transpose(0, 2, 3, 1)


STAND_INS = {("numpy.core.multiarray", "_reconstruct"): _Array, ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype}
