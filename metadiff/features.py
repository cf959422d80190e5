"""The feature bank: every image's features, by class and memory-mapped, and the transform that puts them on a known scale."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn
from tqdm import tqdm

from metadiff.arrays import create_array
from metadiff.artifact import Artifact, write_atomically
from metadiff.config import config
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, ImageSet, augmentation, batches_in_order

_ROWS = 4096


@config
class EmbedConfig:
    """How the bank is made."""

    dtype: Literal["fp16", "fp32"] = "fp16"
    augmented_views: Annotated[int, Field(ge=0)] = 0
    """Extra, randomly augmented views of the base images, after the clean one."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    precision: Literal["fp32", "bf16"] = "fp32"


@config
class FeaturesConfig:
    """The transform of raw features, fitted on the base classes; the steps are applied in this order."""

    power: Annotated[float, Field(gt=0)] = 1.0
    """Element-wise sign(x) |x|^power; 0.5 is the square root of the power transform."""
    centre: bool = True
    """Subtract the mean of all base features."""
    l2: bool = True
    """Divide each feature vector by its length."""
    std: Annotated[float, Field(gt=0)] | None = 0.1
    """Scale so that base features have this standard deviation per dimension; null leaves the scale alone."""


@dataclass(frozen=True)
class FeatureBank:
    """One split's raw features, sorted by class.

    Attributes:
        views: (1 + V, n, D) float16 or float32, memory-mapped; view 0 is clean.
        offsets: (C + 1,) where each class begins.
        classes: C names.
    """

    views: np.ndarray
    offsets: np.ndarray
    classes: tuple[str, ...]

    @property
    def features(self) -> np.ndarray:
        """(n, D), the clean view."""
        return self.views[0]

    @classmethod
    def open(cls, artifact: Artifact, split: str) -> "FeatureBank":
        """The split's features from an `embed` artifact.

        Raises:
            UserError: the data set has no such split.
        """
        if f"{split}.features.npy" not in artifact.manifest["files"]:
            raise UserError(f"split {split!r}: not in {artifact.path}; the data set has none, so give it one or name another split")
        views = np.load(artifact.file(f"{split}.features.npy"), mmap_mode="r")
        classes = json.loads(artifact.file(f"{split}.classes.json").read_text())
        return cls(views, np.load(artifact.file(f"{split}.offsets.npy")), tuple(classes))


class FeatureTransform:
    """x -> scale * unit(power(x) - mean): a fixed, recorded map of raw features (n, D) to float32 ones of known scale."""

    def __init__(self, power: float, mean: torch.Tensor, l2: bool, scale: float) -> None:
        self.power, self.mean, self.l2, self.scale = power, mean, l2, scale

    def __call__(self, raw: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(..., D) raw features to (..., D) float32."""
        x = torch.as_tensor(np.array(raw, np.float32) if isinstance(raw, np.ndarray) else raw.float())
        if self.power != 1.0:
            x = x.sign() * x.abs() ** self.power
        x = x - self.mean
        if self.l2:
            x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return x * self.scale

    @classmethod
    def fit(cls, features: np.ndarray, settings: FeaturesConfig) -> "FeatureTransform":
        """Fit to raw base features (n, D).

        Raises:
            UserError: the features hold NaN or infinity, or are all the same.
        """
        transform = cls(settings.power, torch.zeros(features.shape[1]), False, 1.0)
        mean, _ = _moments(features, transform)
        if settings.centre:
            transform.mean = mean.float()
        transform.l2 = settings.l2
        if settings.std is not None:
            variance = float(_moments(features, transform)[1].mean())
            if variance <= 0:
                raise UserError("feature bank: all features are the same; the backbone collapsed: lower pretrain.learning_rate")
            transform.scale = settings.std / variance**0.5
        return transform

    def state(self) -> dict[str, torch.Tensor | float | bool]:
        """All there is to record."""
        return {"power": self.power, "mean": self.mean, "l2": self.l2, "scale": self.scale}


def _moments(features: np.ndarray, transform: FeatureTransform) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance per dimension of the transformed features, both (D,) float64."""
    total, squares = (torch.zeros(features.shape[1], dtype=torch.float64) for _ in range(2))
    for start in range(0, len(features), _ROWS):
        x = transform(features[start : start + _ROWS]).double()
        total += x.sum(0)
        squares += (x * x).sum(0)
    if not torch.isfinite(squares).all():
        raise UserError(
            "feature bank: holds NaN or infinite features; the backbone diverged, so pretrain again with a lower pretrain.learning_rate"
        )
    mean = total / len(features)
    return mean, squares / len(features) - mean**2


def write_bank(
    folder: Path,
    split: str,
    images: ImageSet,
    backbone: nn.Module,
    settings: EmbedConfig,
    augment: AugmentConfig,
    seed: int,
    device: torch.device,
) -> None:
    """Embed a split into `<split>.features.npy`, `<split>.offsets.npy` and `<split>.classes.json`, unless they are there already.

    Raises:
        UserError: the features are not finite, or too large for the bank's numbers.
    """
    if is_embedded(folder, split):
        return
    views = range(num_views(settings, split))
    batches = (embed_images(images.images, backbone, settings, augment if view else None, seed + view, device) for view in views)
    with tqdm(total=len(views) * len(images.labels), desc=f"embed {split}", unit="image", mininterval=1.0) as progress:
        write_features(folder, split, images, _counted(chain.from_iterable(batches), progress), settings)


def write_features(folder: Path, split: str, images: ImageSet, parts: Iterable[np.ndarray], settings: EmbedConfig) -> None:
    """Write a split's bank from raw features: view after view, each (n, D) in parts of any number of rows.

    `<split>.classes.json` is written last: a split that has it is whole, and is not embedded again after a kill.

    Raises:
        UserError: the features are not finite, or too large for the bank's numbers.
    """
    np.save(folder / f"{split}.offsets.npy", images.offsets)
    out: np.memmap | None = None
    row = 0
    for features in parts:
        if out is None:
            shape = (num_views(settings, split), len(images.labels), features.shape[1])
            out = create_array(folder / f"{split}.features.npy", _DTYPES[settings.dtype], shape)
        out.reshape(-1, features.shape[1])[row : row + len(features)] = _stored(features, settings.dtype, split)
        row += len(features)
    assert out is not None
    assert row == out.shape[0] * out.shape[1]
    out.flush()
    write_atomically(folder / f"{split}.classes.json", json.dumps(list(images.classes)).encode())


def is_embedded(folder: Path, split: str) -> bool:
    """Whether the split's bank in `folder` is whole."""
    return (folder / f"{split}.classes.json").exists()


def num_views(settings: EmbedConfig, split: str) -> int:
    """The clean view, and the augmented ones of base images."""
    return 1 + (settings.augmented_views if split == "base" else 0)


def _counted(parts: Iterable[np.ndarray], progress: tqdm) -> Iterator[np.ndarray]:
    for features in parts:
        yield features
        progress.update(len(features))


_DTYPES: Mapping[str, type] = {"fp16": np.float16, "fp32": np.float32}


def _stored(features: np.ndarray, dtype: str, split: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = features.astype(_DTYPES[dtype])
    if not np.isfinite(stored).all():
        raise UserError(
            f"embed {split}: features that are NaN or too large for {dtype} (largest {np.abs(features).max():.3g}); "
            "set embed.dtype=fp32, or pretrain again with a lower pretrain.learning_rate"
        )
    return stored


def embed_images(
    images: np.ndarray, backbone: nn.Module, settings: EmbedConfig, augment: AugmentConfig | None, seed: int, device: torch.device
) -> Iterator[np.ndarray]:
    """(n, H, H, 3) uint8 images to batches of (B, D) float32 features, in order."""
    transform = augmentation(augment, images.shape[1]) if augment else None
    return embed_batches(batches_in_order(images, settings.batch_size, transform, seed), backbone, settings, device)


@torch.inference_mode()
def embed_batches(
    batches: Iterable[torch.Tensor], backbone: nn.Module, settings: EmbedConfig, device: torch.device
) -> Iterator[np.ndarray]:
    """Batches of (B, 3, H, W) normalised images to batches of (B, D) float32 features."""
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            features = backbone(batch.to(device))
        yield features.float().cpu().numpy()
