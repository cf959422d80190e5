"""Classes as folders of images: all that are there, or those that published lists name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from metadiff.datasets.source import ImageSource, by_class, disjoint
from metadiff.datasets.tree import FileTree, open_tree
from metadiff.errors import UserError

# Our splits, and the name of each one's folder or list in the published data sets.
PUBLISHED = {"base": "train", "val": "val", "novel": "test"}


def images_by_class(tree: FileTree, at: str) -> dict[str, list[str]]:
    """The paths of the images in each folder in the folder `at`.

    Raises:
        UserError: there is no folder in it, or one without images.
    """
    names = tree.folders(at)
    if not names:
        raise UserError(f"{at}: no class folder in it; expected one folder of images for each class: add them, or delete {at}")
    return {name: _images(tree, f"{at}/{name}") for name in names}


def class_lists(folder: Path, suffix: str, line: str, example: str) -> dict[str, list[str]]:
    """The classes of each split, as the lists `train`, `val` and `test` (with `suffix`) in `folder` name them.

    `line` is a regular expression for a line of a list, its first group the class; `example` is such a line.

    Raises:
        UserError: the list of the base classes is missing, or a list is empty or has a line unlike the example.
    """
    tree = open_tree(folder, f"expected a folder of class lists: train{suffix}, val{suffix} and test{suffix}")
    there = {split: f"{name}{suffix}" for split, name in PUBLISHED.items() if f"{name}{suffix}" in tree.files(tree.root)}
    if "base" not in there:
        raise UserError(f"{tree.root}: no train{suffix} in it; expected class lists train{suffix}, val{suffix} and test{suffix}")
    return {split: _listed(tree, f"{tree.root}/{name}", line, example) for split, name in there.items()}


def listed_sources(tree: FileTree, lists: Mapping[str, Sequence[str]], expected: str) -> dict[str, ImageSource]:
    """The splits whose listed classes are folders in the tree's top or in `train/`, `val/` and `test/` there, whichever holds them.

    A split of which no class is there is left out. `expected` says in an error what should be there and where to get it.

    Raises:
        UserError: no base class is there, a split lacks some of its classes, or a class has no images, two folders or two splits.
    """
    top = tree.top(*(f"{name}/" for name in (*PUBLISHED.values(), *lists["base"])))
    places = _places(tree, top) if top else {}
    missing = {split: [name for name in names if name not in places] for split, names in lists.items()}
    present = {split: names for split, names in lists.items() if len(missing[split]) < len(names)}
    if "base" not in present:
        raise UserError(f"{tree.root}: no folder of any class of the base list; {expected}")
    for split in present:
        if missing[split]:
            many = f"{len(missing[split])} of the {len(lists[split])} {split} classes"
            raise UserError(f"{top}: class {missing[split][0]} has no folder ({many} have none); add what is missing: {expected}")
    sources = {split: {name: _images(tree, places[name]) for name in names} for split, names in present.items()}
    return disjoint({split: by_class(images, tree.open_image) for split, images in sources.items()}, str(top))


def _images(tree: FileTree, at: str) -> list[str]:
    images = tree.images(at)
    if not images:
        raise UserError(f"{at}: a class folder without images; delete it or add images")
    return images


def _listed(tree: FileTree, path: str, line: str, example: str) -> list[str]:
    """The classes in one list."""
    lines = [each.strip() for each in tree.text(path).splitlines() if each.strip()]
    matches = [re.fullmatch(line, each) for each in lines]
    wrong = [each for each, match in zip(lines, matches, strict=True) if not match]
    if wrong or not lines:
        found = f"the line {wrong[0][:80]!r}" if wrong else "nothing in it"
        raise UserError(f"{path}: {found}; expected a class on each line, like {example}: fetch the list again")
    return [match[1] for match in matches if match]


def _places(tree: FileTree, top: str) -> dict[str, str]:
    """The folder of each class."""
    places: dict[str, str] = {}
    for place in (top, *(f"{top}/{name}" for name in PUBLISHED.values())):
        for name in tree.folders(place):
            if name in places:
                raise UserError(
                    f"{top}: class {name} is both in {places[name]} and in {place}/{name}; expected once: give only one of the two as root"
                )
            places[name] = f"{place}/{name}"
    return places
