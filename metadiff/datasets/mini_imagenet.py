"""mini-ImageNet: 100 ImageNet classes x 600 images of 84 x 84, split 64 / 16 / 20 (Ravi & Larochelle, ICLR 2017)."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Literal

from metadiff.config import config
from metadiff.datasets.folders import PUBLISHED, images_by_class
from metadiff.datasets.source import ImageSource, by_class, disjoint
from metadiff.datasets.tree import FileTree, open_tree
from metadiff.errors import UserError

EXPECTED = (
    "expected mini-ImageNet: images/*.jpg with train.csv, val.csv and test.csv (filename,label), or class folders train/, val/ and test/; "
    "the csv files are in github.com/twitter-research/meta-learning-lstm, the images are ImageNet's (image-net.org)"
)


@config
class MiniImageNet:
    """mini-ImageNet in a folder or a zip, at its top or inside the one folder there.

    Either `images/*.jpg` with `train.csv`, `val.csv` and `test.csv` (header `filename,label`),
    or class folders `train|val|test/<wnid>/*.jpg`.
    The lists are Ravi & Larochelle's (github.com/twitter-research/meta-learning-lstm), the images are ImageNet's (image-net.org):
    non-commercial research and education.
    """

    kind: Literal["mini_imagenet"] = "mini_imagenet"
    root: Path

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The splits that are there; they are fixed, whatever the seed. A list of which no image is there is an absent split.

        Raises:
            UserError: no such folder or zip, no base split in it, a wrong list, missing images, or a class in two splits.
        """
        tree = open_tree(self.root, EXPECTED)
        top = tree.top("train.csv", "train/")
        if top is None:
            raise UserError(f"{tree.root}: neither train.csv nor train/ in it; {EXPECTED}")
        in_one_folder = "images" in tree.folders(top) and "train.csv" in tree.files(top)
        found = {split: (_listed_images if in_one_folder else _foldered_images)(tree, top, name) for split, name in PUBLISHED.items()}
        sources = {split: source for split, source in found.items() if source}
        if "base" not in sources:
            raise UserError(f"{top}: none of the base images in it; {EXPECTED}")
        return disjoint(sources, top)


def _foldered_images(tree: FileTree, top: str, name: str) -> ImageSource | None:
    """The images in the class folders of a split; None where it is absent."""
    return by_class(images_by_class(tree, f"{top}/{name}"), tree.open_image) if name in tree.folders(top) else None


def _listed_images(tree: FileTree, top: str, name: str) -> ImageSource | None:
    """The images that a split's list names, by class; None where there is no list, or not one of its images."""
    path = f"{top}/{name}.csv"
    if f"{name}.csv" not in tree.files(top):
        return None
    rows = _rows(tree.text(path), path)
    there = {*tree.files(f"{top}/images")}
    missing = [file for file, _ in rows if file not in there]
    if len(missing) == len(rows):
        return None
    if missing:
        raise UserError(f"{path}: {missing[0]} ({len(missing)} of {len(rows)} images) is not in {top}/images; add what is missing")
    images: defaultdict[str, list[str]] = defaultdict(list)
    for file, label in rows:
        images[label].append(f"{top}/images/{file}")
    return by_class(images, tree.open_image)


def _rows(text: str, path: str) -> list[tuple[str, str]]:
    """The (filename, label) pairs of a list."""
    lines = csv.reader(text.splitlines())
    header = next(lines, [])
    if header[:2] != ["filename", "label"]:
        raise UserError(f"{path}: its first line is {','.join(header)[:80]!r}; expected filename,label: put that line at the top")
    rows = [row for row in lines if row]
    if not rows:
        raise UserError(f"{path}: lists no image; expected filename,label lines: delete it or fetch it again")
    wrong = next((",".join(row) for row in rows if len(row) < 2 or not row[0] or not row[1]), None)
    if wrong is not None:
        raise UserError(f"{path}: the line {wrong[:80]!r} names no image and class; expected filename,label: fetch it again")
    return [(row[0], row[1]) for row in rows]
