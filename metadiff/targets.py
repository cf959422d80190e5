"""Targets: the base learner trained on all base images of a task's classes. MetaDiff (AAAI 2024), Algorithm 1, line 3.

Shapes throughout: B tasks, N classes (the way), C base classes, D feature dimensions, M images in the largest class.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from metadiff.arrays import create_array
from metadiff.artifact import Artifact, write_atomically
from metadiff.config import config
from metadiff.episodes import EpisodeSampler
from metadiff.errors import UserError
from metadiff.lbfgs import minimise
from metadiff.learners import Learner, PrototypeLearner, Support

SUMMARY = "targets.json"
DIAGNOSTICS = [("objective", "f4"), ("gradient_norm", "f4"), ("iterations", "i4"), ("accuracy", "f4")]
"""The fields of `diagnostics.npy`."""
DTYPES: Mapping[str, type] = {"fp16": np.float16, "fp32": np.float32}
_ROWS = 1024


@config
class TargetsConfig:
    """How many tasks there are, and what their targets are."""

    kind: Literal["mean", "ce"] = "mean"
    """`mean`, the minimiser of Eq. 11, is the class means; `ce` minimises the cross-entropy, and a linear learner needs it."""
    num_tasks: Annotated[int, Field(gt=0)] = 20_000
    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    """A fit has converged when no element of its gradient is larger."""
    max_iterations: Annotated[int, Field(gt=0)] = 500
    pull: Annotated[float, Field(ge=0)] = 0.0
    """Adds pull/2 ||w - class means||^2 to the prototypes' cross-entropy, which by itself may fall for ever as they drift apart."""
    std: Annotated[float, Field(gt=0)] | None = 0.1
    """Scale a linear learner's targets to this standard deviation per element; prototypes keep the features' scale."""
    dtype: Literal["fp16", "fp32"] = "fp32"
    block: Annotated[int, Field(gt=0)] = 16
    """Tasks fitted at once: they hold block x N x M x D floats, under the cosine three times."""


@dataclass(frozen=True, eq=False)
class FittedTargets:
    """The fits of B tasks.

    Attributes:
        w: (B, N, D).
        objective: (B,) the loss at w.
        gradient_norm: (B,) the largest element of its gradient; above the tolerance where the fit has not converged.
        iterations: (B,) int64, evaluations of loss and gradient.
        accuracy: (B,) on the images that it was fitted to, 0 to 1.
    """

    w: Tensor
    objective: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    accuracy: Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """A run's tasks and their targets, memory-mapped.

    Attributes:
        weights: (num_tasks, N, D), or (C, D) where all tasks share the class means.
        class_ids: (num_tasks, N) int64, each task's classes in order.
        scale: what turns the base learner's weights into those of the diffusion.
    """

    weights: np.ndarray
    class_ids: np.ndarray
    scale: float

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return len(self.class_ids)

    @property
    def dim(self) -> int:
        """D."""
        return self.weights.shape[-1]

    def classes(self, task_ids: np.ndarray) -> np.ndarray:
        """(B,) task ids to (B, N) classes."""
        return self.class_ids[task_ids]

    def w_0(self, task_ids: np.ndarray) -> Tensor:
        """(B,) task ids to (B, N, D) float32 targets, multiplied by `scale`."""
        shared = self.weights.ndim == 2
        w = self.weights[self.class_ids[task_ids] if shared else task_ids]
        return torch.from_numpy(np.asarray(w, np.float32)) * self.scale

    @classmethod
    def open(cls, artifact: Artifact) -> "Targets":
        """The targets in a `fit_targets` artifact."""
        weights, class_ids = (np.load(artifact.file(f"{name}.npy"), mmap_mode="r") for name in ("targets", "classes"))
        return cls(weights, class_ids, json.loads(artifact.file(SUMMARY).read_text())["scale"])


def write_targets(
    folder: Path, features: Tensor, offsets: np.ndarray, sampler: EpisodeSampler, learner: Learner, settings: TargetsConfig
) -> dict[str, Any]:
    """Fit the targets of tasks 0 .. num_tasks - 1 into `folder`, going on where a killed run stopped; returns the summary.

    Writes `classes.npy`, `targets.npy` (see `Targets`) and `targets.json`; for kind "ce" also `diagnostics.npy`, whose fields are those
    of `FittedTargets` but w. Features (n, D) are transformed, sorted by class; the fits run on their device.

    Raises:
        UserError: the settings do not suit the learner, or a fit is not finite.
    """
    check_targets(settings, learner)
    classes = sampler.classes(np.arange(settings.num_tasks))
    np.save(folder / "classes.npy", classes)
    if settings.kind == "mean":
        np.save(folder / "targets.npy", class_means(features, offsets).cpu().numpy().astype(DTYPES[settings.dtype]))
    else:
        _fit_in_blocks(folder, features, offsets, classes, learner, settings)
    return summarise(folder, learner, settings)


def summarise(folder: Path, learner: Learner, settings: TargetsConfig) -> dict[str, Any]:
    """Write and return `targets.json` for the `classes.npy`, `targets.npy` and, for kind "ce", `diagnostics.npy` in `folder`."""
    classes, targets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("classes", "targets"))
    summary: dict[str, Any] = {"tasks": len(classes), "scale": target_scale(targets, learner, settings)}
    if settings.kind == "ce":
        diagnostics = np.load(folder / "diagnostics.npy", mmap_mode="r")
        summary["unconverged"] = int((diagnostics["gradient_norm"] > settings.tolerance).sum())
        summary |= {f"mean_{name}": float(diagnostics[name].mean(dtype=np.float64)) for name, _ in DIAGNOSTICS}
    write_atomically(folder / SUMMARY, json.dumps(summary).encode())
    return summary


def class_means(features: Tensor, offsets: np.ndarray) -> Tensor:
    """(C, D): the mean of each class of features (n, D), the minimiser of Eq. 11 on all its images.

    Raises:
        UserError: a mean is not finite.
    """
    means = torch.stack([features[start:end].mean(0) for start, end in pairwise(offsets.tolist())])
    bad = (~means.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"features of classes {bad[:5]} ({len(bad)} in all): not finite; pretrain again with a lower pretrain.learning_rate"
        )
    return means


def fit_targets(
    features: Tensor, offsets: np.ndarray, classes: np.ndarray, learner: Learner, settings: TargetsConfig, first_task: int = 0
) -> FittedTargets:
    """Minimise the learner's cross-entropy on all images of each task's classes, from the class means on.

    The cosine leaves the prototypes' lengths open: without a pull they keep those of the class means. Fits that do not converge,
    as on separable classes under dot or Euclidean logits without a pull, are returned as they are.

    Args:
        features: (n, D) float, transformed, sorted by class.
        offsets: (C + 1,) where each class begins.
        classes: (B, N).
        first_task: the id of the first task, for the error.

    Raises:
        UserError: the settings do not suit the learner, or the loss is not finite at the class means.
    """
    check_targets(settings, learner)
    support = _auxiliary(features, offsets, classes)
    fit = minimise(_Objective(learner, support, settings.pull), support.means, settings.tolerance, settings.max_iterations)
    bad = (~(fit.loss.flatten() + fit.gradient_norm).isfinite()).nonzero().flatten().tolist()
    if bad:
        tasks = f"tasks {[first_task + task for task in bad[:5]]} ({len(bad)} in all)"
        raise UserError(f"targets of {tasks}: the loss is not finite; check features.std and the features of their classes")
    hits = (learner.logits(fit.w, support.features).argmax(-1) == support.labels).sum(1) / support.size
    return FittedTargets(fit.w, fit.loss.flatten(), fit.gradient_norm, fit.evaluations, hits)


def target_scale(w: np.ndarray, learner: Learner, settings: TargetsConfig) -> float:
    """What gives linear targets (T, N, D) the configured standard deviation per element; 1 for prototypes, which have the features' scale.

    Their mean is zero: at a minimum, the N weights of a linear learner add up to nothing.
    """
    if isinstance(learner, PrototypeLearner) or settings.std is None:
        return 1.0
    squares = sum(float(np.square(w[start : start + _ROWS], dtype=np.float64).sum()) for start in range(0, len(w), _ROWS))
    return settings.std / math.sqrt(squares / w.size)


def _fit_in_blocks(
    folder: Path, features: Tensor, offsets: np.ndarray, classes: np.ndarray, learner: Learner, settings: TargetsConfig
) -> None:
    done = json.loads((folder / SUMMARY).read_text())["tasks"] if (folder / SUMMARY).is_file() else 0
    shape = (*classes.shape, features.shape[1])
    if not done:
        create_array(folder / "targets.npy", DTYPES[settings.dtype], shape)
        create_array(folder / "diagnostics.npy", DIAGNOSTICS, shape[:1])
    targets, diagnostics = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("targets", "diagnostics"))
    with tqdm(total=len(classes), initial=done, desc="fit targets", unit="task", mininterval=1.0) as progress:
        for start in range(done, len(classes), settings.block):
            block = slice(start, min(start + settings.block, len(classes)))
            fitted = fit_targets(features, offsets, classes[block], learner, settings, start)
            targets[block] = fitted.w.cpu().numpy()
            for name, _ in DIAGNOSTICS:
                diagnostics[name][block] = getattr(fitted, name).cpu().numpy()
            targets.flush()
            diagnostics.flush()
            # Only now: whoever resumes trusts every task below this number.
            write_atomically(folder / SUMMARY, json.dumps({"tasks": block.stop}).encode())
            progress.update(block.stop - start)


def _auxiliary(features: Tensor, offsets: np.ndarray, classes: np.ndarray) -> Support:
    """D_base^tau: all images of each task's classes, (B, N x M) of them whichever the tasks, padded with copies."""
    sizes = np.diff(offsets)
    places = np.arange(sizes.max())
    rows = offsets[classes][..., None] + np.minimum(places, sizes[classes][..., None] - 1)
    labels = np.where(places < sizes[classes][..., None], np.arange(classes.shape[1])[:, None], -1)
    rows, labels = (torch.from_numpy(array.reshape(len(classes), -1)).to(features.device) for array in (rows, labels))
    return Support(features[rows], labels, classes.shape[1])


class _Objective:
    """The loss of B tasks on all their images, with the pull to the class means."""

    def __init__(self, learner: Learner, support: Support, pull: float) -> None:
        self.learner, self.support, self.pull = learner, support, pull
        self.lengths_open = isinstance(learner, PrototypeLearner) and learner.kind == "cosine" and pull == 0

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        away = w - self.support.means
        loss = self.learner.ce_loss(w, self.support) + self.pull / 2 * away.square().sum((1, 2))
        return loss[:, None, None], self.learner.ce_gradient(w, self.support) + self.pull * away

    def __getitem__(self, problems: Tensor) -> "_Objective":
        support = Support(self.support.features[problems], self.support.labels[problems], self.support.way)
        return _Objective(self.learner, support, self.pull)

    def place(self, w: Tensor) -> Tensor:
        """On the sphere of the class means' lengths where the loss leaves them open."""
        return F.normalize(w, dim=-1) * self.support.means.norm(dim=-1, keepdim=True) if self.lengths_open else w


def check_targets(settings: TargetsConfig, learner: Learner) -> None:
    """Refuse settings that do not suit the learner.

    Raises:
        UserError: class means or a pull for a linear learner.
    """
    if isinstance(learner, PrototypeLearner):
        return
    if settings.kind == "mean":
        raise UserError("targets.kind=mean: learner.kind=linear has no use for class means; set targets.kind=ce")
    if settings.pull:
        raise UserError(f"targets.pull={settings.pull}: is for prototypes alone; with learner.kind=linear use learner.l2 instead")
