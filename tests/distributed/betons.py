"""A small prepared data set with its `.beton`."""

from pathlib import Path

import numpy as np
import torch

from distributed.beton import BetonConfig, beton_name, write_beton
from metadiff.artifact import Artifact, commit, workspace
from metadiff.images import ImageSet, normalise

SIZE, CLASSES, PER_CLASS = 20, 6, 10


def noise(seed: int = 0) -> ImageSet:
    images = np.random.default_rng(seed).integers(0, 256, (CLASSES * PER_CLASS, SIZE, SIZE, 3), dtype=np.uint8)
    return ImageSet(images, np.repeat(np.arange(CLASSES), PER_CLASS), tuple("abcdef"))


def prepared(folder: Path, images: ImageSet, settings: BetonConfig | None = None) -> Artifact:
    """An artifact of `prepare` that holds nothing but the base split's `.beton`."""
    partial = workspace(folder / "prepare", "prepare", {}, {})
    write_beton(partial / beton_name("base"), images, settings or BetonConfig(), "beton base")
    return commit(partial, folder / "prepare", "prepare", {}, {}, 0.0)


def normal(images: ImageSet, indices: np.ndarray) -> torch.Tensor:
    """What a loader has to deliver."""
    return normalise(torch.from_numpy(images.images[indices]).permute(0, 3, 1, 2))
