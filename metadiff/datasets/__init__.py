"""Data sets: where images come from, one kind a file."""

from typing import Annotated

from pydantic import Field

from metadiff.datasets.cifar import CifarFs, Fc100
from metadiff.datasets.glyphs import Glyphs
from metadiff.datasets.image_folder import ImageFolder
from metadiff.datasets.mini_imagenet import MiniImageNet
from metadiff.datasets.omniglot import Omniglot
from metadiff.datasets.tiered_imagenet import TieredImageNet

__all__ = ["DatasetConfig"]

DatasetConfig = Annotated[
    CifarFs | Fc100 | Glyphs | ImageFolder | MiniImageNet | Omniglot | TieredImageNet,
    Field(discriminator="kind"),
]
