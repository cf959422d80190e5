"""What every data set hands over: named, labelled images of one split, opened one at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from metadiff.errors import UserError

SPLITS = ("base", "val", "novel")
T = TypeVar("T")


@dataclass(frozen=True)
class ImageSource:
    """The images of one split, not yet read.

    Attributes:
        classes: C class names, sorted, unique.
        labels: (n,) int64, the class of each image; every class has at least one.
        names: n strings, each what a person would need to find the image (a path, or a zip and its member).
        open: maps an index to an RGB image of any size; raises OSError for a file that is not a readable image.
    """

    classes: Sequence[str]
    labels: np.ndarray
    names: Sequence[str]
    open: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.names)


def by_class(images: Mapping[str, Sequence[T]], open: Callable[[T], Image.Image], name: Callable[[T], str] = str) -> ImageSource:
    """The source of `images` (class name to its images, none empty), class after class in sorted order.

    `open` reads one of them as RGB and raises OSError where it cannot; `name` says where it is.
    """
    classes = sorted(images)
    listed = [image for each in classes for image in images[each]]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(images[each]) for each in classes])
    return ImageSource(classes, labels, [name(image) for image in listed], _OpenListed(listed, open))


def disjoint(sources: dict[str, ImageSource], where: str) -> dict[str, ImageSource]:
    """`sources` as they are, once no class is in two of them.

    Raises:
        UserError: a class is in two splits; `where` tells of which data.
    """
    for first, second in combinations(sources, 2):
        shared = sorted({*sources[first].classes} & {*sources[second].classes})
        if shared:
            also = f" (and {len(shared) - 1} more)" if shared[1:] else ""
            raise UserError(
                f"{where}: class {shared[0]}{also} is in both {first} and {second}; expected in one split: take it out of the other"
            )
    return sources


@dataclass(frozen=True)
class _OpenListed(Generic[T]):
    """A plain object rather than a closure, so that a source can be sent to another process."""

    listed: Sequence[T]
    open: Callable[[T], Image.Image]

    def __call__(self, index: int) -> Image.Image:
        return self.open(self.listed[index])
