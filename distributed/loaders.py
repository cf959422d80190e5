"""Images and episodes out of `.beton` files, by FFCV: the same batches as the loaders in memory."""

import os
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from distributed.beton import hold, import_ffcv, verified
from metadiff.artifact import Artifact
from metadiff.config import config
from metadiff.episode_images import EpisodePlan
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, Batch, epoch_order
from metadiff.parallel import ALONE, Ranks


@config
class LoaderConfig:
    """Where training takes its images from; nothing here changes which it takes."""

    kind: Literal["ffcv", "memory"] = "ffcv"
    """`memory` needs neither FFCV nor `.beton` files."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Decoding threads of FFCV, no more than the process may use cores; 0: all of those or, in one of Ray's processes, its share."""
    os_cache: bool = True
    """Let the operating system cache the file; where it is larger than the memory, false reads and forgets it page by page."""


class BetonBatches:
    """Any images of a split's `.beton`, in any order, in batches.

    Building one verifies the file and compiles the decoder, which takes seconds: build it once. It holds the file until it is garbage.

    Args:
        artifact: `prepare`'s.
        augment: how to augment the images; None leaves them as they are.
        seed: with the number of an image's showing, all there is to the augmentation's randomness.
        pinned: hand out batches in memory that a GPU can fetch from by itself.

    Attributes:
        labels: (n,) int64.

    Raises:
        UserError: FFCV is absent, or the file is missing or damaged.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: str,
        batch_size: int,
        settings: LoaderConfig,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        pinned: bool = False,
    ) -> None:
        import_ffcv()
        from distributed.augmentation import transformer
        from distributed.decoding import Decoder

        held = hold(verified(artifact, split))
        weakref.finalize(self, held.close)
        # Again, because it may have been replaced before it was held.
        path = verified(artifact, split)
        num_workers = usable_workers(settings.num_workers)
        self.batch_size = batch_size
        self._decoder = Decoder(path, batch_size, num_workers, settings.os_cache)
        self.labels = torch.from_numpy(self._decoder.labels)
        self._transform = transformer(augment, self._decoder.image_size, seed, num_workers > 1, pinned)

    def batches(self, indices: np.ndarray, numbers: np.ndarray | None = None) -> Generator[Batch, None, None]:
        """(B, 3, H, H) normalised float32 images and (B,) labels, `indices` in their order; the last batch may be smaller.

        Every batch is the caller's to keep. Leaving early stops the decoding.

        Args:
            indices: (n,) any images, also repeatedly.
            numbers: (n,) the how-manieth showing each is; 0, 1 .. where None.

        Raises:
            IndexError: an index out of range.
            RuntimeError: from the iterator, if decoding fails.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self.labels):
            raise IndexError(f"{self._decoder.fname}: asked for images {indices.min()} to {indices.max()}, there are {len(self.labels)}")
        return self._decoded(indices, np.arange(len(indices)) if numbers is None else numbers)

    def _decoded(self, indices: np.ndarray, numbers: np.ndarray) -> Generator[Batch, None, None]:
        from distributed.decoding import DecodingThread

        parts = [slice(start, start + self.batch_size) for start in range(0, len(indices), self.batch_size)]
        if not parts:
            return
        thread = DecodingThread(
            self._decoder, indices.astype(np.uint64), lambda pixels, batch: self._transform(pixels, numbers[parts[batch]])
        )
        try:
            for part in parts:
                yield thread.next_images(), self.labels[indices[part]]
        finally:
            thread.stop()


class FFCVLoader:
    """Shuffled, augmented batches: an ImageLoader that takes the same images as MemoryLoader for the same seed.

    Args:
        batch_size: images of all ranks together.
        ranks: this process takes its share of every batch; augmentation depends on an image's place in the whole batch.

    Raises:
        UserError: FFCV is absent, the file is missing or damaged, or the batch is too large or cannot be shared.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: str,
        batch_size: int,
        augment: AugmentConfig,
        seed: int,
        settings: LoaderConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        self.batch_size, self.seed, self.share = batch_size, seed, ranks.share(batch_size, "pretrain.batch_size")
        self.images = BetonBatches(artifact, split, self.share.stop - self.share.start, settings, augment, seed)
        if batch_size > len(self.images.labels):
            raise UserError(f"pretrain.batch_size={batch_size}: the {split} split has only {len(self.images.labels)} images")

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only, as MemoryLoader's."""
        return len(self.images.labels) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        order = epoch_order(len(self.images.labels), self.batch_size, self.seed, epoch)
        numbers = epoch * len(self.images.labels) + np.arange(order.size).reshape(order.shape)
        return self.images.batches(order[:, self.share].ravel(), numbers[:, self.share].ravel())


class FFCVEpisodes:
    """A plan's support images, decoded in threads ahead of whoever takes them: an `EpisodeImages` with the same images as MemoryEpisodes.

    Args:
        augment: how to augment the images; None leaves them as they are.
        seed: with an image's place in all of the training, all there is to the augmentation's randomness.
        pinned: as `BetonBatches`'.

    Raises:
        UserError: FFCV is absent, or the file is missing or damaged.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: str,
        plan: EpisodePlan,
        settings: LoaderConfig,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        pinned: bool = False,
    ) -> None:
        size = plan.images_a_step // plan.pieces_a_step
        self.plan, self.images = plan, BetonBatches(artifact, split, size, settings, augment, seed, pinned)

    def pieces(self, start: int) -> Generator[torch.Tensor, None, None]:
        """The images of `EpisodeImages`."""
        for drawn in self.plan.ahead(start):
            # Counted over all episodes, so that it matters not which rank shows an image.
            numbers = drawn.episode_ids[..., None] * drawn.support[0, 0].size + np.arange(drawn.support[0, 0].size)
            with closing(self.images.batches(drawn.support.ravel(), numbers.ravel())) as batches:
                yield from (images for images, _ in batches)


def usable_workers(asked: int) -> int:
    """`asked` threads, but no more than this process has cores; with 0, as many as that."""
    from numba.core import config as numba_config

    cores = min(len(os.sched_getaffinity(0)), numba_config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    return min(asked or cores, cores)
