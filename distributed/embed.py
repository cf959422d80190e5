"""The stage `embed`: Ray actors run the frozen backbone over the `.beton` files, part by part, into the feature bank."""

import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor
from tqdm import tqdm

from distributed.config import EngineConfig, here, loader_of_one
from distributed.loaders import BetonBatches
from distributed.runtime import work_through
from metadiff import stages
from metadiff.artifact import write_atomically
from metadiff.features import embed_batches, is_embedded, num_views, write_features
from metadiff.images import ImageSet, augmentation, batches_in_order
from metadiff.pipeline import Run
from metadiff.stages import open_backbone

_BATCHES_A_PART = 8
_PART = ".part.npy"


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of one view of a split: a file of its own until the bank is put together."""

    split: str
    view: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Its name in the workspace."""
        return f"{self.split}.{self.view}.{self.start:09d}{_PART}"


PartReader = Callable[[Part], Iterator[Tensor]]
"""Maps a part to its normalised images, batch by batch."""


def build(run: Run, folder: Path) -> None:
    """Embed what is missing, part by part, and put each split's bank together."""
    settings = cast(EngineConfig, run.config)
    splits = {split: images for split, images in ImageSet.open_all(run.artifacts["prepare"]).items() if not is_embedded(folder, split)}
    parts = {split: _parts(split, images, settings) for split, images in splits.items()}
    todo = [part for of_split in parts.values() for part in of_split if not (folder / part.file).exists()]
    with tqdm(total=sum(part.stop - part.start for part in todo), desc="embed", unit="image", mininterval=1.0) as progress:
        for part, _ in work_through(EmbedWorker, (run, folder), todo, settings.ray):
            progress.update(part.stop - part.start)
    for split, images in splits.items():
        write_features(folder, split, images, (np.load(folder / part.file) for part in parts[split]), settings.embed)
    for part in folder.glob(f"*{_PART}*"):
        part.unlink()


def _parts(split: str, images: ImageSet, settings: EngineConfig) -> list[Part]:
    """Whole batches, so that the features do not depend on who embeds which part."""
    rows, size = len(images.labels), _BATCHES_A_PART * settings.embed.batch_size
    views = range(num_views(settings.embed, split))
    return [Part(split, view, start, min(start + size, rows)) for view in views for start in range(0, rows, size)]


class EmbedWorker:
    """An actor with the backbone and, of each split and view that it has met, the images."""

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._folder = here(run), folder
        self._settings, self._backbone = cast(EngineConfig, run.config), open_backbone(self._run)
        self._batches = cache(self._from_beton if self._settings.loader.kind == "ffcv" else self._from_memory)

    def run(self, part: Part) -> None:
        """Embed the part into its file."""
        batches = self._batches(part.split, part.view > 0)(part)
        features = list(embed_batches(batches, self._backbone, self._settings.embed, self._run.device))
        content = BytesIO()
        np.save(content, np.concatenate(features))
        # Under a name of its own first: two actors may be at the same part.
        own = self._folder / f"{part.file}.{secrets.token_hex(4)}"
        write_atomically(own, content.getvalue())
        own.replace(self._folder / part.file)

    def _from_beton(self, split: str, augmented: bool) -> PartReader:
        settings = self._settings
        augment = settings.pretrain.augment if augmented else None
        loader, size = loader_of_one(settings, settings.ray.num_actors), settings.embed.batch_size
        images = BetonBatches(self._run.artifacts["prepare"], split, size, loader, augment, settings.seed)

        def read(part: Part) -> Iterator[Tensor]:
            rows = np.arange(part.start, part.stop)
            return (pixels for pixels, _ in images.batches(rows, part.view * len(images.labels) + rows))

        return read

    def _from_memory(self, split: str, augmented: bool) -> PartReader:
        images, settings = ImageSet.open(self._run.artifacts["prepare"], split).images, self._settings
        transform = augmentation(settings.pretrain.augment, images.shape[1]) if augmented else None

        def read(part: Part) -> Iterator[Tensor]:
            return batches_in_order(images[: part.stop], settings.embed.batch_size, transform, settings.seed + part.view, part.start)

        return read


_IN_PROCESS = stages.STAGES["embed"]
STAGE = replace(_IN_PROCESS, build=build, sections=(*_IN_PROCESS.sections, "loader.kind"))

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="embed"))
