"""Any images of one's own: a folder for each class in a folder for each split."""

from pathlib import Path
from typing import Literal

from metadiff.config import config
from metadiff.datasets.folders import images_by_class
from metadiff.datasets.source import SPLITS, ImageSource, by_class, disjoint
from metadiff.datasets.tree import open_tree
from metadiff.errors import UserError

EXPECTED = (
    "expected base/<class>/*.jpg (or .png, .webp, ...), and val/ and novel/ like it where there are such classes: put your images there"
)


@config
class ImageFolder:
    """Images of any size in `base|val|novel/<class>/*`, in a folder or a zip, at its top or inside the one folder there.

    `val` and `novel` may be absent. Read are .jpg .jpeg .png .webp .bmp .gif .ppm .tif .tiff, in upper or lower case.
    """

    kind: Literal["image_folder"] = "image_folder"
    root: Path

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The splits that are there; they are as the folders are, whatever the seed.

        Raises:
            UserError: no such folder or zip, no base split in it, a split without classes, a class without images or in two splits.
        """
        tree = open_tree(self.root, EXPECTED)
        top = tree.top("base/")
        if top is None:
            raise UserError(f"{tree.root}: no base/ in it; {EXPECTED}")
        present = [split for split in SPLITS if split in tree.folders(top)]
        return disjoint({split: by_class(images_by_class(tree, f"{top}/{split}"), tree.open_image) for split in present}, top)
