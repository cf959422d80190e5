"""tieredImageNet: 608 ImageNet classes in 34 groups, split by group into 351 / 97 / 160 (Ren et al., ICLR 2018)."""

from pathlib import Path
from typing import Literal

from metadiff.config import config
from metadiff.datasets.folders import class_lists, listed_sources
from metadiff.datasets.source import ImageSource
from metadiff.datasets.tree import open_tree

EXPECTED = (
    "expected <wnid>/*.JPEG, or train/, val/ and test/ with such folders: the training images of ImageNet (ILSVRC 2012, image-net.org)"
)


@config
class TieredImageNet:
    """tieredImageNet from class folders, in a folder or a zip: `<wnid>/*` or `train|val|test/<wnid>/*`.

    ImageNet's own training folder will do as `root`: only listed classes are read. The images are those of ImageNet's training set
    (image-net.org): non-commercial research and education.

    Attributes:
        root: the folder or zip.
        splits: the folder of `train.csv`, `val.csv` and `test.csv`, a line `wnid,group` for each class
            (github.com/renmengye/few-shot-ssl-public).
    """

    kind: Literal["tiered_imagenet"] = "tiered_imagenet"
    root: Path
    splits: Path

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The splits that are there; they are as listed, whatever the seed. A list of which no class is there is an absent split.

        Raises:
            UserError: no such folder, no base class in it, a wrong list, or a listed class without folder or images, or in two splits.
        """
        lists = class_lists(self.splits, ".csv", r"(n\d{8}),n\d{8}", example="n01530575,n01524359")
        return listed_sources(open_tree(self.root, EXPECTED), lists, EXPECTED)
