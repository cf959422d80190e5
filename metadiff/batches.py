"""What a rank trains on: scaled targets w_0 and the support sets of its share of each iteration's tasks, out of a bank or out of images.

Both sources give the same tasks and the same support images for the same seed and iteration, whatever the number of ranks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from metadiff.bank_support import BankSupport
from metadiff.episode_images import Drawn, EpisodeImages, EpisodePlan
from metadiff.features import FeatureBank, FeatureTransform
from metadiff.learners import Support
from metadiff.targets import Targets

_SHARE = 0.25
"""Of the device's memory: what is larger than this stays memory-mapped, and is gathered and transformed anew in every iteration."""
_ROWS = 8192
_CGROUP = Path("/sys/fs/cgroup/memory.max")

Batches = Iterator[tuple[Tensor, Support]]
OpenImages = Callable[[EpisodePlan], EpisodeImages]


class TargetRows:
    """The targets of a plan's tasks on a device: on a GPU the whole table lies there if it has room, elsewhere the file stays mapped."""

    def __init__(self, targets: Targets, device: torch.device) -> None:
        self._targets, self._device = targets, device
        resident = device.type != "cpu" and targets.table.nbytes <= room(device)
        self._table = targets.table.to(device) if resident else targets.table

    def of(self, drawn: Drawn) -> Iterator[Tensor]:
        """(E, N, D) scaled targets w_0 of each step."""
        rows = _to(torch.from_numpy(self._targets.rows(drawn.task_ids)), self._table.device)
        return (_to(self._targets.gather(self._table, step), self._device) for step in rows)


class FeatureSource:
    """Batches out of the bank of features, transformed once and kept on the device.

    Args:
        bank: the base split's; each support image is seen in any of its views.
        seed: with the iteration, all there is to the choice of views.
        device: where the training computes.
        world: the ranks that share this machine's memory.
    """

    def __init__(
        self, bank: FeatureBank, transform: FeatureTransform, targets: Targets, seed: int, device: torch.device, world: int = 1
    ) -> None:
        self._bank, self._transform, self._targets, self._seed, self._device, self._world = bank, transform, targets, seed, device, world

    def batches(self, plan: EpisodePlan, start: int) -> Batches:
        """A rank's training batches from iteration `start` on."""
        targets = TargetRows(self._targets, self._device)
        for drawn in plan.ahead(start):
            rows = torch.from_numpy(self._rows(plan, drawn))
            yield from zip(targets.of(drawn), self._supports(rows), strict=True)

    def _rows(self, plan: EpisodePlan, drawn: Drawn) -> np.ndarray:
        """(M, E, N, K): where the support images of each step lie among all views' features."""
        num_views, num_images, _ = self._bank.views.shape
        if num_views == 1:
            return drawn.support
        steps, (_, *episode, way, shot) = range(drawn.start, drawn.start + len(drawn.support)), drawn.support.shape
        draws = [np.random.default_rng([self._seed, step]).integers(num_views, size=(plan.batch_size, way * shot)) for step in steps]
        return np.stack(draws)[:, plan.share].reshape(-1, *episode, way, shot) * num_images + drawn.support

    def _supports(self, rows: Tensor) -> Iterator[Support]:
        bank = self._resident
        if bank is not None:
            return (BankSupport(bank, step) for step in _to(rows, self._device))
        return (self._gathered(step) for step in rows)

    def _gathered(self, rows: Tensor) -> Support:
        """From a bank that is too large for the device."""
        raw = self._bank.views.reshape(-1, self._bank.views.shape[-1])[rows.numpy().ravel()]
        return BankSupport(_to(self._transform(raw), self._device), torch.arange(rows.numel(), device=self._device).view(rows.shape))

    @cached_property
    def _resident(self) -> Tensor | None:
        """(views n, D): the whole bank, transformed, on the device; None if it would take too much of its memory."""
        raw = self._bank.views.reshape(-1, self._bank.views.shape[-1])
        # Several ranks on a GPU each have their own, but on a CPU they share.
        if 4 * raw.size > room(self._device) / (self._world if self._device.type == "cpu" else 1):
            return None
        bank = torch.empty(raw.shape, device=self._device)
        for first in range(0, len(raw), _ROWS):
            bank[first : first + _ROWS] = self._transform(raw[first : first + _ROWS])
        return bank


class ImageSource:
    """Batches out of images, which the frozen backbone sees in every iteration anew. Only support images are decoded.

    Args:
        images: opens a plan's images.
        backbone: on `device`, in evaluation mode.
        precision: what the backbone computes in, by autocast.
    """

    def __init__(
        self,
        images: OpenImages,
        backbone: nn.Module,
        transform: FeatureTransform,
        targets: Targets,
        precision: str,
        device: torch.device,
    ) -> None:
        self._images, self._targets, self._precision, self._device = images, targets, precision, device
        # Frozen batch norms are scalings, which the convolutions before them take over: a third more images per second.
        self._backbone = fuse(backbone).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._transform = FeatureTransform(transform.power, transform.mean.to(device), transform.l2, transform.scale)

    def batches(self, plan: EpisodePlan, start: int) -> Batches:
        """A rank's training batches from iteration `start` on; a loader with threads decodes the next meanwhile."""
        targets = TargetRows(self._targets, self._device)
        places = torch.arange(plan.images_a_step, device=self._device).view(plan.episodes_a_step, plan.sampler.way, -1)
        with closing(self._images(plan).pieces(start)) as pieces:
            for drawn in plan.ahead(start):
                for w_0 in targets.of(drawn):
                    features = torch.cat([self._features(next(pieces)) for _ in range(plan.pieces_a_step)])
                    yield w_0, BankSupport(features, places)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """(P, D): transformed features of (P, 3, H, H) images."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            raw = self._backbone(_to(images, self._device))
        return self._transform(raw.float())


def room(device: torch.device) -> float:
    """Bytes that one array may take of the device's memory."""
    if device.type == "cuda":
        return _SHARE * torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text().strip() if _CGROUP.exists() else "max"
    return _SHARE * (total if limit == "max" else min(total, int(limit)))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; to a GPU it goes from pinned memory, while the next is made. Not run on a GPU yet."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
