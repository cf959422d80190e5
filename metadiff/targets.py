"""Targets: the base learner trained on all base images of a task's classes. MetaDiff (AAAI 2024), Algorithm 1, line 3.

Shapes throughout: B tasks, N classes (the way), C base classes, D feature dimensions, M images in the largest class.
"""

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from metadiff.arrays import create_array
from metadiff.artifact import Artifact, write_atomically
from metadiff.config import config
from metadiff.episodes import EpisodeSampler
from metadiff.errors import UserError
from metadiff.grouped import ClassFeatures, GroupedObjective
from metadiff.lbfgs import Minimum, minimise
from metadiff.learners import Learner, PrototypeLearner
from metadiff.machine import return_freed_memory

SUMMARY = "targets.json"
DIAGNOSTICS = [("objective", "f4"), ("gradient_norm", "f4"), ("iterations", "i4"), ("accuracy", "f4")]
"""The fields of `diagnostics.npy`."""
DTYPES: Mapping[str, type] = {"fp16": np.float16, "fp32": np.float32}
_ROWS = 1024
_BLOCK = 1024
_NEARLY = 3
_VECTORS, _MARGINS = 70, 7
"""Arrays of the size of the weights and of the margins that a fit takes at its peak, holes included that the allocator cannot reuse."""


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
    gap: Annotated[float, Field(ge=0)] = 0.0
    """A linear learner's fit has converged as well when its loss is within this of the least, by ||gradient||^2 / (2 l2)."""
    products: Literal["mixed", "full"] = "mixed"
    """`mixed` rounds the factors of matrix products to bfloat16 (TF32 on CUDA) on the way, where the hardware is faster at that; the end
    is computed, and judged, in float32 either way."""
    memory_gb: Annotated[float, Field(gt=0)] = 2.0
    """For the tasks that are fitted at once, beside the features: as many as there is room for."""


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

    @cached_property
    def table(self) -> Tensor:
        """(R, D): the weights row by row, memory-mapped and of the type that they are stored in."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
            return torch.from_numpy(self.weights).view(-1, self.dim)

    def rows(self, task_ids: np.ndarray) -> np.ndarray:
        """(...) task ids to (..., N) int64: which rows of the table are their weights."""
        if self.weights.ndim == 2:
            return self.class_ids[task_ids]
        way = self.class_ids.shape[1]
        return task_ids[..., None] * way + np.arange(way)

    def w_0(self, task_ids: np.ndarray) -> Tensor:
        """(B,) task ids to (B, N, D) float32 targets, multiplied by `scale`."""
        return self.gather(self.table, torch.from_numpy(self.rows(task_ids)))

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """(B, N, D): `w_0` of `rows` (B, N) of the table or a copy of it, on the device of both."""
        w = table.index_select(0, rows.flatten()).view(*rows.shape, -1).float()
        return w if self.scale == 1 else w.mul_(self.scale)

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
        unconverged = diagnostics["gradient_norm"] > settings.tolerance
        if settings.gap and not isinstance(learner, PrototypeLearner):
            unconverged &= diagnostics["iterations"] >= settings.max_iterations  # the others were close enough by the gap
        summary["unconverged"] = int(unconverged.sum())
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


class TargetSolver:
    """Fits targets of any number of tasks on the base classes, whose features it holds.

    Args:
        features: (n, D) float, transformed, sorted by class; the fits run on their device.
        offsets: (C + 1,) where each class begins.

    Raises:
        UserError: the settings do not suit the learner.
    """

    def __init__(self, features: Tensor, offsets: np.ndarray, learner: Learner, settings: TargetsConfig) -> None:
        check_targets(settings, learner)
        self.learner, self.settings = learner, settings
        self.data = ClassFeatures(features, offsets, isinstance(learner, PrototypeLearner) and learner.kind == "cosine")
        self.reduced = settings.products == "mixed" and _has_fast_products(features.device)

    def fit(self, classes: np.ndarray, first_task: int = 0) -> FittedTargets:
        """Minimise the learner's cross-entropy on all images of each task's classes (B, N), within `memory_gb`.

        The cosine leaves the prototypes' lengths open: without a pull they keep those of the class means. Fits that do not converge,
        as on separable classes under dot or Euclidean logits without a pull, are returned as they are.

        Args:
            first_task: the id of the first task, for the error.

        Raises:
            UserError: the loss is not finite at the start.
        """
        size = tasks_at_once(classes.shape[1], self.data.x.shape[1], int(self.data.sizes.max()), self.settings)
        parts = [self._fit_together(classes[start : start + size]) for start in range(0, len(classes), size)]
        fitted = FittedTargets(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))
        bad = (~(fitted.objective + fitted.gradient_norm).isfinite()).nonzero().flatten().tolist()
        if bad:
            tasks = f"tasks {[first_task + task for task in bad[:5]]} ({len(bad)} in all)"
            raise UserError(f"targets of {tasks}: the loss is not finite; check features.std and the features of their classes")
        return fitted

    def _fit_together(self, classes: np.ndarray) -> FittedTargets:
        """Where rounded products are faster, with them as far as they lead, and for the last bit corrected; then in full."""
        of_tasks, most = torch.from_numpy(classes).to(self.data.x.device), self.settings.max_iterations
        exact = self._objective(of_tasks)
        found, left = Minimum.nowhere(exact.start), torch.arange(len(classes), device=of_tasks.device)
        if self.reduced and most > 1:
            left = self._descend_rounded(of_tasks, found, left)
            nearly = exact.largest(found.gradient[left]) <= _NEARLY * self.settings.tolerance
            left = torch.cat([left[~nearly], self._descend_rounded(of_tasks, found, left[nearly])])
        spent = int(found.evaluations.max())
        if len(left) and spent < most:
            here = minimise(self._objective(of_tasks[left]), found.w[left], most - spent)
            here.evaluations += found.evaluations[left]
            found.put(left, here)
        w, largest, accuracy = found.w @ self.data.rotation.T, exact.largest(found.gradient), exact.accuracy(found.w)
        del exact
        return_freed_memory()
        return FittedTargets(w, found.loss.flatten(), largest, found.evaluations, accuracy)

    def _descend_rounded(self, of_tasks: Tensor, found: Minimum, left: Tensor) -> Tensor:
        """Move the tasks `left` on from where they are, and judge them in full precision; returns those that are not there yet."""
        spent = int(found.evaluations.max())
        if not len(left) or self.settings.max_iterations - spent < 3:  # one to start from, one to move to, one to judge it
            return left
        rounded, exact = self._objective(of_tasks[left], reduced=True), self._objective(of_tasks[left])
        rounded.aim(found.w[left], found.gradient[left] if spent else None)
        here = minimise(rounded, found.w[left], self.settings.max_iterations - spent - 1)
        loss, gradient = exact(here.w)
        found.put(left, Minimum(here.w, loss, gradient, found.evaluations[left] + here.evaluations + 1))
        return left[~exact.converged(gradient)]

    def _objective(self, of_tasks: Tensor, reduced: bool = False) -> GroupedObjective:
        settings = self.settings
        tolerance = 0.9 * settings.tolerance if reduced else settings.tolerance
        return GroupedObjective(self.data, of_tasks, self.learner, settings.pull, tolerance, settings.gap, reduced)


def tasks_at_once(way: int, dim: int, largest_class: int, settings: TargetsConfig) -> int:
    """How many tasks `memory_gb` has room for: their weights and L-BFGS's pairs, and the margins and probabilities of all their images."""
    each = 4 * way * (_VECTORS * dim + _MARGINS * way * largest_class)
    return max(1, int(settings.memory_gb * 1e9 / each))


def _has_fast_products(device: torch.device) -> bool:
    """Whether products that round their factors are several times faster than those that do not."""
    return device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)


def target_scale(w: np.ndarray, learner: Learner, settings: TargetsConfig) -> float:
    """What gives linear targets (T, N, D) the configured standard deviation per element; 1 for prototypes, which have the features' scale.

    Their mean is zero: at a minimum, the N weights of a linear learner add up to nothing.
    """
    if isinstance(learner, PrototypeLearner) or settings.std is None:
        return 1.0
    squares = sum(float(np.square(w[start : start + _ROWS], dtype=np.float64).sum()) for start in range(0, len(w), _ROWS))
    return settings.std / math.sqrt(squares / w.size) if squares else 1.0


def _fit_in_blocks(
    folder: Path, features: Tensor, offsets: np.ndarray, classes: np.ndarray, learner: Learner, settings: TargetsConfig
) -> None:
    done = json.loads((folder / SUMMARY).read_text())["tasks"] if (folder / SUMMARY).is_file() else 0
    shape = (*classes.shape, features.shape[1])
    if not done:
        create_array(folder / "targets.npy", DTYPES[settings.dtype], shape)
        create_array(folder / "diagnostics.npy", DIAGNOSTICS, shape[:1])
    targets, diagnostics = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("targets", "diagnostics"))
    solver = TargetSolver(features, offsets, learner, settings)
    with tqdm(total=len(classes), initial=done, desc="fit targets", unit="task", mininterval=1.0) as progress:
        for start in range(done, len(classes), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(classes)))
            fitted = solver.fit(classes[block], start)
            targets[block] = fitted.w.cpu().numpy()
            for name, _ in DIAGNOSTICS:
                diagnostics[name][block] = getattr(fitted, name).cpu().numpy()
            targets.flush()
            diagnostics.flush()
            # Only now: whoever resumes trusts every task below this number.
            write_atomically(folder / SUMMARY, json.dumps({"tasks": block.stop}).encode())
            progress.update(block.stop - start)


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
