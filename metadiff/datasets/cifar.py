"""CIFAR-FS and FC100: the 100 classes of CIFAR-100 x 600 images of 32 x 32, split in two ways."""

from pathlib import Path
from typing import Literal

from metadiff.config import config
from metadiff.datasets.cifar_archive import ORIGIN, find_archive
from metadiff.datasets.folders import class_lists, listed_sources
from metadiff.datasets.source import ImageSource, by_class, disjoint
from metadiff.datasets.tree import open_tree
from metadiff.errors import UserError

EXPECTED = f"expected cifar-100-python.tar.gz from {ORIGIN}, or it unpacked, or class folders <class>/*.png"


@config
class CifarFs:
    """CIFAR-FS, 64 / 16 / 20 classes drawn at random (Bertinetto et al., ICLR 2019).

    Attributes:
        root: the folder of the CIFAR-100 python archive (cs.toronto.edu/~kriz/cifar.html), packed or not, or of class folders
            `<class>/*.png` or `train|val|test/<class>/*.png`; or the archive or a zip of class folders itself.
        splits: the folder of `train.txt`, `val.txt` and `test.txt`, a class name a line (github.com/bertinetto/r2d2).
    """

    kind: Literal["cifar_fs"] = "cifar_fs"
    root: Path
    splits: Path

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The splits that are there; they are as listed, whatever the seed.

        Raises:
            UserError: nothing readable at `root`, a wrong list, or a listed class without folder or images, or in two splits.
        """
        return _sources(self.root, self.splits)


@config
class Fc100:
    """FC100, 60 / 20 / 20 classes split by superclass (Oreshkin et al., NeurIPS 2018: TADAM).

    Attributes:
        root: as for CIFAR-FS.
        splits: the folder of `train.txt`, `val.txt` and `test.txt`, a class name a line (github.com/ElementAI/TADAM).
    """

    kind: Literal["fc100"] = "fc100"
    root: Path
    splits: Path

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The splits that are there; they are as listed, whatever the seed.

        Raises:
            UserError: nothing readable at `root`, a wrong list, or a listed class without folder or images, or in two splits.
        """
        return _sources(self.root, self.splits)


def _sources(root: Path, splits: Path) -> dict[str, ImageSource]:
    lists = class_lists(splits, ".txt", "([a-z_]+)", example="aquarium_fish")
    archive = find_archive(root.expanduser())
    if archive is None:
        return listed_sources(open_tree(root, EXPECTED), lists, EXPECTED)
    for split, names in lists.items():
        unknown = [name for name in names if name not in archive.images]
        if unknown:
            raise UserError(
                f"{splits}: {split} class {unknown[0]} ({len(unknown)} of {len(names)}) is not in CIFAR-100; fetch the lists again"
            )
    images = {split: {name: archive.images[name] for name in names} for split, names in lists.items()}
    return disjoint({split: by_class(each, archive.open, archive.name) for split, each in images.items()}, str(splits))
