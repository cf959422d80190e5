"""`.beton` files: written from the prepared arrays, verified before they are opened, held while they are read."""

import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from metadiff.artifact import Artifact, sha256
from metadiff.config import config
from metadiff.errors import UserError
from metadiff.images import ImageSet

_MIN_PAGE, _IMAGES_A_PAGE = 1 << 21, 8
_SEED = 0
_verified: set[tuple[str, str, int, int, int]] = set()


@config
class BetonConfig:
    """How FFCV stores the pixels."""

    write_mode: Literal["raw", "jpg", "proportion", "smart"] = "raw"
    """`raw` keeps the very pixels; `jpg` is smaller, slower to read and lossy; `proportion` and `smart` mix both."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    jpeg_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of images that `proportion` compresses."""
    jpeg_above: Annotated[int, Field(ge=0)] = 65536
    """`smart` compresses images of more raw bytes."""


def beton_name(split: str) -> str:
    """The file of a split in `prepare`'s artifact."""
    return f"{split}.beton"


def import_ffcv() -> None:
    """Import FFCV, which nothing but its loader and its writer needs.

    Raises:
        UserError: it is not installed, or a library that it needs is not.
    """
    threads = torch.get_num_threads()
    try:
        import ffcv.loader
        import ffcv.writer  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"loader.kind='ffcv': FFCV cannot be imported ({error}); apt-get install -y --no-install-recommends g++ python3-dev pkg-config "
            "libturbojpeg0-dev libopencv-dev && pip install 'metadiff[ffcv]', or set loader.kind=memory"
        ) from None
    finally:
        # FFCV sets the whole process to one thread when it is imported.
        torch.set_num_threads(threads)


def write_beton(path: Path, images: ImageSet, settings: BetonConfig, label: str) -> None:
    """Write a split's images and labels, in their order, unless the file is there already.

    It appears under its name when it is whole and on the disk. The same arrays, settings and libraries make the same bytes: one process
    writes, because several would lay their pages down in the order in which they happen to fill.

    Raises:
        UserError: FFCV is absent.
        OSError: no space left.
    """
    if path.exists():
        return
    import_ffcv()
    from ffcv.writer import DatasetWriter

    temporary = path.with_name(path.name + ".tmp")
    page_size = _page_size(images.images[0].nbytes)
    _require_room(temporary.parent, images, settings)
    writer: Any = DatasetWriter(str(temporary), _fields(settings), page_size, num_workers=1)
    writer.num_samples = len(images.labels)
    writer.prepare()
    # FFCV shares the table of samples with processes that it starts; here is none, and ordinary memory leaves nothing behind.
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()
    metadata = np.zeros(writer.num_samples, writer.metadata_type)
    allocations = _write_samples(writer, metadata, images, label)
    writer.metadata_sm = SimpleNamespace(buf=metadata.tobytes())
    writer.finalize(allocations)
    _require_whole(temporary, page_size)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def verified(artifact: Artifact, split: str) -> Path:
    """The split's `.beton`, checked against the manifest; FFCV itself reads wrong images or crashes where one is damaged.

    The size is checked at every call, the checksum once per process for the file as it lies there.

    Raises:
        UserError: it is not there, or is not the file that `prepare` wrote.
    """
    name = beton_name(split)
    if name not in artifact.manifest["files"]:
        raise UserError(
            f"artifact {artifact.path}: has no {name}; redo prepare with loader.kind=ffcv and --force, or set loader.kind=memory"
        )
    path, expected = artifact.path / name, artifact.manifest["files"][name]
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"artifact {artifact.path}: {name} is missing; redo prepare with --force") from None
    if found.st_size != expected["bytes"]:
        raise UserError(
            f"artifact {artifact.path}: {name} has {found.st_size} bytes, the manifest says {expected['bytes']}; redo prepare with --force"
        )
    key = (str(path), expected["sha256"], found.st_ino, found.st_mtime_ns, found.st_size)
    if key not in _verified:
        checksum = sha256(path)
        if checksum != expected["sha256"]:
            raise UserError(
                f"artifact {artifact.path}: {name} has the checksum {checksum[:12]}..., the manifest says {expected['sha256'][:12]}...; "
                "redo prepare with --force"
            )
        _verified.add(key)
    return path


def hold(path: Path) -> BinaryIO:
    """Mark the file as being read, until the returned handle is closed or this process ends.

    Raises:
        UserError: it is missing, or is just being replaced.
    """
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; redo prepare with --force") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise UserError(f"{path}: is being replaced by another run; start again when it is done") from None
    return handle


def in_use(path: Path) -> bool:
    """Whether some process reads the file."""
    # Not read-only: network file systems lock exclusively only what may be written.
    with path.open("r+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def refuse_if_in_use(folder: Path) -> None:
    """For whoever replaces the artifact in `folder`.

    Raises:
        UserError: another run reads one of its `.beton` files.
    """
    for path in sorted(folder.glob(beton_name("*"))):
        if in_use(path):
            raise UserError(f"{path}: in use by another run; wait until that one has ended, or choose another run.name")


def _fields(settings: BetonConfig) -> dict:
    from ffcv.fields import IntField, RGBImageField

    image = RGBImageField(
        write_mode=settings.write_mode,
        smart_threshold=settings.jpeg_above,
        jpeg_quality=settings.jpeg_quality,
        compress_probability=settings.jpeg_share,
    )
    return {"image": image, "label": IntField()}


def _write_samples(writer: Any, metadata: np.ndarray, images: ImageSet, label: str) -> list:
    """The pixels, page by page; what FFCV's own worker process does, without a process that could die unnoticed."""
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import handle_sample

    allocator = MemoryAllocator(writer.fname, writer.data_region_start, writer.page_size)
    state = np.random.get_state()
    np.random.seed(_SEED)  # `proportion` draws from the global generator.
    try:
        with allocator, tqdm(total=len(images.labels), desc=label, unit="image", mininterval=1.0) as progress:
            for row, (image, number) in enumerate(zip(images.images, images.labels, strict=True)):
                handle_sample((image, number), row, writer.metadata_type.names, metadata, allocator, writer.fields)
                progress.update()
    finally:
        np.random.set_state(state)
    return allocator.allocations


def _page_size(image_bytes: int) -> int:
    """A power of two that holds several images, so that little is lost at a page's end."""
    return max(_MIN_PAGE, 1 << (_IMAGES_A_PAGE * image_bytes - 1).bit_length())


def _require_room(folder: Path, images: ImageSet, settings: BetonConfig) -> None:
    """Refuse at once what will not fit; of compressed images the size is known only in the end."""
    free = os.statvfs(folder)
    if settings.write_mode == "raw" and images.images.nbytes > free.f_bavail * free.f_frsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _require_whole(path: Path, page_size: int) -> None:
    """FFCV does not look at how much of a page a full disk has taken."""
    from ffcv.types import ALLOC_TABLE_TYPE, HeaderType

    header = np.fromfile(path, HeaderType, count=1)[0]
    table, samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
    if table % page_size or path.stat().st_size != table + samples * ALLOC_TABLE_TYPE.itemsize:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
