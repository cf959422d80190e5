"""Prepared images: uint8 arrays of one size, memory-mapped, and the in-memory loader that feeds them to training."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from tqdm import tqdm

from metadiff.arrays import create_array
from metadiff.artifact import Artifact, write_atomically
from metadiff.config import config
from metadiff.datasets.source import SPLITS, ImageSource
from metadiff.errors import UserError
from metadiff.parallel import ALONE, Ranks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batch = tuple[torch.Tensor, torch.Tensor]
Transform = Callable[[torch.Tensor], torch.Tensor]


@config
class PrepareConfig:
    """How source images become arrays."""

    image_size: Annotated[int, Field(ge=8)] = 84
    """Side in pixels: the shorter side is resized to it, the middle square is kept."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, instead of stopping."""


@config
class AugmentConfig:
    """Training-time augmentation (torchvision v2); off where a class would change its meaning."""

    crop: Literal["none", "shift", "resized"] = "resized"
    """`shift` moves by up to an eighth of the side; `resized` crops 35 to 100 % of the area."""
    flip: bool = True
    color_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0


class ImageLoader(Protocol):
    """What training needs of a loader: epochs of (B, 3, H, W) normalised float images and (B,) int64 labels."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one epoch."""
        ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, a pure function of the loader's seed and `epoch`."""
        ...


@dataclass(frozen=True)
class ImageSet:
    """The prepared images of one split.

    Attributes:
        images: (n, H, H, 3) uint8, memory-mapped.
        labels: (n,) int64, ascending.
        classes: C names.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    @property
    def offsets(self) -> np.ndarray:
        """(C + 1,) where each class begins."""
        return np.searchsorted(self.labels, np.arange(len(self.classes) + 1))

    def head(self, per_class: int) -> "ImageSet":
        """The first `per_class` images of every class."""
        places = np.arange(len(self.labels)) - self.offsets[self.labels]
        return ImageSet(self.images[places < per_class], self.labels[places < per_class], self.classes)

    @classmethod
    def open_all(cls, artifact: Artifact) -> dict[str, "ImageSet"]:
        """The splits there are."""
        return {split: cls.open(artifact, split) for split in SPLITS if f"{split}.images.npy" in artifact.manifest["files"]}

    @classmethod
    def open(cls, artifact: Artifact, split: str) -> "ImageSet":
        """The split's arrays from a `prepare` artifact.

        Raises:
            UserError: the data set has no such split.
        """
        if f"{split}.images.npy" not in artifact.manifest["files"]:
            there = [name for name in SPLITS if f"{name}.images.npy" in artifact.manifest["files"]]
            raise UserError(
                f"split {split!r}: not in {artifact.path}, which has {', '.join(there)}; give the data set that split or ask for another"
            )
        return cls.read(artifact.path, split)

    @classmethod
    def read(cls, folder: Path, split: str) -> "ImageSet":
        """The arrays that `write_split` left in `folder`."""
        classes = json.loads((folder / f"{split}.classes.json").read_text())
        images = np.load(folder / f"{split}.images.npy", mmap_mode="r")
        return cls(images, np.load(folder / f"{split}.labels.npy"), tuple(classes))


class MemoryLoader:
    """Shuffled, augmented batches from arrays in memory; every batch depends on (seed, epoch, step) alone.

    Args:
        batch_size: images of all ranks together.
        ranks: this process takes its share of every batch.

    Raises:
        UserError: the batch is larger than the set, or cannot be shared equally.
    """

    def __init__(self, images: ImageSet, batch_size: int, augment: AugmentConfig, seed: int, ranks: Ranks = ALONE) -> None:
        if batch_size > len(images.labels):
            raise UserError(f"pretrain.batch_size={batch_size}: the base split has only {len(images.labels)} images")
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.share = ranks.share(batch_size, "pretrain.batch_size")
        self.transform = augmentation(augment, images.images.shape[1])

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: a last, smaller one would disturb batch norm."""
        return len(self.images.labels) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        for step, chosen in enumerate(epoch_order(len(self.images.labels), self.batch_size, self.seed, epoch)):
            # All of the batch, because the transforms of its images draw from one stream, one after the other.
            pixels = transformed(self.images.images[chosen], self.transform, [self.seed, epoch, step])
            yield normalise(pixels[self.share]), torch.from_numpy(self.images.labels[chosen[self.share]])


def epoch_order(num_images: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """(steps, batch_size): the images of each whole batch of an epoch, ascending within a batch, as they lie on the disk."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    return np.sort(order[: num_images // batch_size * batch_size].reshape(-1, batch_size), axis=1)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 pixels to float32 with the usual channel means and deviations, channels last in memory."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def batches_in_order(
    images: np.ndarray, batch_size: int, transform: Transform | None = None, seed: int = 0, first: int = 0
) -> Iterator[torch.Tensor]:
    """All images from `first` on once, in order: (B, 3, H, W) normalised; `seed` is the random transform's."""
    for start in range(first, len(images), batch_size):
        pixels = images[start : start + batch_size]
        yield normalise(transformed(pixels, transform, [seed, start]))


def fit_to_square(image: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8: the image's middle square, resized."""
    return np.asarray(ImageOps.fit(_upright(image).convert("RGB"), (size, size), Image.Resampling.BILINEAR))


def write_split(folder: Path, split: str, source: ImageSource, prepare: PrepareConfig) -> None:
    """Decode a split into `<split>.images.npy`, `<split>.labels.npy` and `<split>.classes.json`, sorted by class.

    The last of them is written last: a split that has it is whole, and is not decoded again after a kill.

    Raises:
        UserError: images that cannot be read, by name, unless `skip_bad_images`.
    """
    if (folder / f"{split}.classes.json").exists():
        return
    size = prepare.image_size
    order = np.argsort(source.labels, kind="stable")
    images = create_array(folder / f"{split}.images.npy", np.uint8, (len(source), size, size, 3))
    bad: list[str] = []
    good = np.ones(len(source), bool)
    for row, index in enumerate(tqdm(order.tolist(), f"prepare {split}", unit="image", mininterval=1.0)):
        try:
            images[row] = fit_to_square(source.open(index), size)
        except (OSError, SyntaxError, ValueError) as error:
            good[row] = False
            bad.append(f"{source.names[index]} ({error})")
    for name in bad:
        tqdm.write(f"{split}: not readable as an image: {name}", file=sys.stderr)
    if bad and not prepare.skip_bad_images:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{split}: not readable as images: {', '.join(bad[:3])}{more}; mend or delete them, or set prepare.skip_bad_images=true"
        )
    if bad:
        images = _keep(folder / f"{split}.images.npy", images, good)
        write_atomically(folder / f"{split}.skipped.txt", "\n".join(bad).encode())
    images.flush()
    labels = np.asarray(source.labels, np.int64)[order][good]
    _check_classes(split, source, labels)
    np.save(folder / f"{split}.labels.npy", labels)
    write_atomically(folder / f"{split}.classes.json", json.dumps(list(source.classes)).encode())


def _keep(path: Path, images: np.memmap, good: np.ndarray) -> np.memmap:
    kept = create_array(path.with_suffix(".kept"), np.uint8, (int(good.sum()), *images.shape[1:]))
    for target, index in enumerate(np.flatnonzero(good)):
        kept[target] = images[index]
    path.with_suffix(".kept").replace(path)
    return kept


def _check_classes(split: str, source: ImageSource, labels: np.ndarray) -> None:
    left = np.bincount(labels, minlength=len(source.classes))
    if (left == 0).any():
        name = source.classes[int(np.flatnonzero(left == 0)[0])]
        raise UserError(f"{split}: class {name!r} has no readable image left; mend its images or delete the class")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says: cameras store what they took sideways as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:
        # Damaged EXIF tells no orientation, and nothing against the pixels.
        return image


def _as_tensor(images: np.ndarray) -> torch.Tensor:
    # A copy, because torch warns of read-only memory, which memory-mapped images are.
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)


def transformed(images: np.ndarray, transform: Transform | None, entropy: list[int]) -> torch.Tensor:
    """(B, H, H, 3) uint8 images to (B, 3, H, H), each transformed by random numbers that depend on `entropy` alone."""
    if transform is None:
        return _as_tensor(images)
    with torch.random.fork_rng(devices=[]):
        # torchvision draws from the global generator; the fork keeps that inside this batch.
        torch.default_generator.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        return torch.stack([transform(image) for image in _as_tensor(images)])


def augmentation(augment: AugmentConfig, size: int) -> Transform:
    """The random transform of one (3, H, W) uint8 image."""
    from torchvision.transforms import v2  # here, because its import takes seconds, in every process

    steps: Mapping[str, list[Transform]] = {
        "none": [],
        "shift": [v2.RandomCrop(size, padding=size // 8, padding_mode="edge")],
        "resized": [v2.RandomResizedCrop(size, scale=(0.35, 1.0), antialias=True)],
    }
    jitter = augment.color_jitter
    return v2.Compose(
        [*steps[augment.crop], v2.RandomHorizontalFlip(0.5 if augment.flip else 0.0)]
        + ([v2.ColorJitter(jitter, jitter, jitter)] if jitter else [])
    )
