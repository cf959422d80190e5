"""The cross-entropy of many tasks at once on all images of their classes, class by class. MetaDiff (AAAI 2024), Algorithm 1, line 3.

Tasks share classes, so no task's images are ever gathered: for each class, one matrix product of its images with the weights of every
task that has it. Shapes throughout: B tasks, N classes (the way), C base classes, D feature dimensions, M images of one class, b tasks
with that class.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metadiff.learners import Learner, LinearLearner

_REFRESHED_EVERY = 4
_LEAST_CURVATURE = 1e-3
_EVENED_OUT, _EVENED_OUT_OF_PROTOTYPES = 0.75, 0.5
_LOWEST = 1e-4
"""How far below the gradient at the start a descent in reduced precision can come."""
_SHORTEST = 0.1
"""Of a class mean's length, for a prototype under the cosine on its way: at zero there is no gradient, and near it none that helps."""
_PATIENCE, _PROGRESS = 10, 0.9
"""A descent in reduced precision ends when so many evaluations have not brought the squared gradient below this share of the least."""
_NOTHING = 1e-13
"""Of the strongest second moment; what is left would be rounding, and denormal numbers, which are slow."""


class ClassFeatures:
    """The base classes' features, turned into the eigenvectors of their second moment, where each class's own is nearly diagonal.

    A rotation changes neither logits nor losses nor lengths; it is what makes a diagonal preconditioner worth having. Directions that
    no feature has are left out: there, a linear learner's weights are zero and prototypes stay at the class means, which are zero.

    Args:
        features: (n, D) float, sorted by class.
        offsets: (C + 1,) where each class begins.
        unit: whether the logits are those of features of unit length.

    Attributes:
        x: (n, R) rotated, R <= D.
        rotation: (D, R), x = features @ rotation.
        sizes: (C,) images of each class.
        means: (C, R) rotated means of the features as given.
        moments: (C, R) mean squares of x.
    """

    def __init__(self, features: Tensor, offsets: np.ndarray, unit: bool) -> None:
        self._spans = [slice(*span) for span in pairwise(offsets.tolist())]
        x = F.normalize(features, dim=-1) if unit else features
        self.rotation = _principal_axes([x[span] for span in self._spans])
        self.means = torch.stack([features[span].mean(0) for span in self._spans]) @ self.rotation
        self.x = x @ self.rotation
        self.moments = torch.stack([self.of(label).square().mean(0) for label in range(len(self._spans))])
        self.sizes = torch.from_numpy(np.diff(offsets)).to(features)

    def of(self, label: int) -> Tensor:
        """(M, D): one class."""
        return self.x[self._spans[label]]


@dataclass(eq=False)
class _Group:
    """The b tasks with one class.

    Attributes:
        label: the class.
        own: (b,) its rows among the (B x N) weights.
        others: (N - 1, b) the rows of its tasks' other classes.
        margins: (N - 1, b, M) for each of its images, the others' logits less its own, without the bias.
    """

    label: int
    own: Tensor
    others: Tensor
    margins: Tensor

    def only(self, tasks: Tensor, rows: Tensor) -> "_Group | None":
        """What is left of it for the tasks that a (B,) mask picks, with the (B x N,) new numbers of the rows."""
        kept = tasks[self.own // (len(self.others) + 1)]
        return _Group(self.label, rows[self.own[kept]], rows[self.others[:, kept]], self.margins[:, kept]) if kept.any() else None


class GroupedObjective:
    """The losses of B tasks, with the learner's penalty, as functions of rotated weights (B, N, D): an `lbfgs.Objective`.

    It keeps the margins of the point where it was called last, and moves them along with it.

    Args:
        classes: (B, N) int64.
        pull: adds pull/2 ||w - class means||^2 to the prototypes' cross-entropy.
        tolerance: a task has converged when no element of its gradient, in the axes of the features as given, is larger.
        gap: a linear learner's has as well when its loss is at most this above the least, by the bound ||gradient||^2 / (2 l2).
        reduced: whether products may round to bfloat16, or TF32 on CUDA. Moves are then rounded before (`place`), so that margins
            that are linear in the weights stay those of the weights, and errors shrink with the moves.
    """

    _OF_TASKS = ("classes", "means", "size", "w", "v", "spread", "diagonal", "error", "tolerance", "least", "idle")

    def __init__(
        self,
        data: ClassFeatures,
        classes: Tensor,
        learner: Learner,
        pull: float = 0.0,
        tolerance: float = 1e-5,
        gap: float = 0.0,
        reduced: bool = False,
    ) -> None:
        self.data, self.classes, self.learner, self.pull = data, classes, learner, pull
        self.gap, self.reduced = gap, reduced
        self.means, self.size = data.means[classes], data.sizes[classes].sum(1)[:, None, None]
        self.w = self.v = torch.zeros_like(self.means)
        self.spread = self.means.new_zeros(classes.numel(), classes.shape[1]).view(*classes.shape, -1)
        self.diagonal = torch.ones_like(self.means)
        self.error, self.tolerance = torch.zeros_like(self.means), torch.full_like(self.size[:, 0, 0], tolerance)
        self.least, self.idle = torch.full_like(self.tolerance, torch.inf), torch.zeros_like(self.tolerance)
        self.calls = 0
        self.groups = [self._group(label) for label in classes.unique().tolist()]

    @property
    def start(self) -> Tensor:
        """(B, N, D): nothing for a linear learner, the class means for prototypes."""
        return torch.zeros_like(self.means) if isinstance(self.learner, LinearLearner) else self.means.clone()

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (B, 1, 1) and their gradients (B, N, D)."""
        v, bias = _as_logits(self.learner, w)
        with _products(self.reduced, w.device):
            loss, along_v, along_bias = self._over_images(v - self.v, bias)
        self.w, self.v = w, v
        if self.calls % _REFRESHED_EVERY == 0:
            self.diagonal = self._curvature()
        self.calls += 1
        gradient = _pulled_back(self.learner, w, along_v, along_bias).sub_(self.error)
        away, strength = self._penalty(w)
        loss += strength / 2 * away.square().sum((1, 2), keepdim=True) - (self.error * w).sum((1, 2), keepdim=True)
        return loss, gradient.add_(away, alpha=strength)

    def aim(self, w: Tensor, gradient: Tensor | None) -> None:
        """Before a descent from w in reduced precision: aim no lower than its rounding allows.

        Args:
            gradient: at w, in full precision if it is known. Near w, where rounding errs alike, gradients are then as good as that.
        """
        rounded = self(w)[1]
        if gradient is not None:
            self.error = rounded - gradient
        else:
            self.tolerance = torch.maximum(self.tolerance, _LOWEST * self.largest(rounded))

    def __getitem__(self, problems: Tensor) -> "GroupedObjective":
        """The same for the tasks that a (B,) mask picks."""
        fewer = object.__new__(GroupedObjective)
        vars(fewer).update({name: value[problems] if name in self._OF_TASKS else value for name, value in vars(self).items()})
        way = self.classes.shape[1]
        rows = ((problems.cumsum(0) - 1)[:, None] * way + torch.arange(way, device=problems.device)).flatten()
        fewer.groups = [left for group in self.groups if (left := group.only(problems, rows))]
        return fewer

    def place(self, w: Tensor) -> Tensor:
        """The permitted point next to w: on the sphere of the class means' lengths where the loss leaves them open, and never near zero."""
        if not isinstance(self.learner, LinearLearner) and self.learner.kind == "cosine":
            now, length = w.norm(dim=-1, keepdim=True), self.means.norm(dim=-1, keepdim=True)
            return w * (_SHORTEST * length / now).clamp(min=1.0) if self.pull else w / now * length
        return self.w + (w - self.w).bfloat16() if self.reduced else w

    def precondition(self, gradient: Tensor) -> Tensor:
        """(B, N, D): the gradient over an estimate of the Hessian's diagonal, assembled from the second moments of the classes.

        Along a prototype the cosine is flat: there, all there is is the pull.
        """
        if isinstance(self.learner, LinearLearner) or self.learner.kind != "cosine":
            return gradient / self.diagonal
        unit = F.normalize(self.w, dim=-1)
        along = (gradient * unit).sum(-1, keepdim=True)
        across = (gradient - along * unit) / self.diagonal
        across -= (across * unit).sum(-1, keepdim=True) * unit
        return across + along * unit / (self.pull or self.diagonal.mean((1, 2), keepdim=True))

    def converged(self, gradient: Tensor) -> Tensor:
        """(B,) bool; in reduced precision also the tasks whose gradient falls no further, as rounding, or chance, has it."""
        square = gradient.square().sum((1, 2))
        done = square <= self.tolerance**2
        if isinstance(self.learner, LinearLearner):
            done |= square / (2 * self.learner.l2) <= self.gap
        # Undoing the rotation is worth its price when the root mean square is a third of the tolerance: the largest is above that.
        near = ~done & (square <= self.tolerance**2 * gradient[0].numel() / 9)
        done[near] = self.largest(gradient[near]) <= self.tolerance[near]
        return done | self._stalled(square) if self.reduced else done

    def _stalled(self, square: Tensor) -> Tensor:
        lower = square < _PROGRESS * self.least
        self.least, self.idle = torch.where(lower, square, self.least), torch.where(lower, 0.0, self.idle + 1)
        return self.idle >= _PATIENCE

    def largest(self, gradient: Tensor) -> Tensor:
        """(B,): the largest element in the axes of the features as given."""
        with _products(self.reduced, gradient.device):
            return (gradient @ self.data.rotation.T).abs().amax((1, 2))

    def accuracy(self, w: Tensor) -> Tensor:
        """(B,): the share of the images whose own class has the largest logit."""
        v, bias = _as_logits(self.learner, w)
        hits, rows = torch.zeros_like(self.size[:, 0, 0]), v.flatten(0, 1)
        for group in self.groups:
            margins = _margins(rows, group, self.data.of(group.label))
            if bias is not None:
                margins += _differences(bias.flatten(), group)
            hits.index_add_(0, group.own // v.shape[1], (margins.amax(0) < 0).sum(1).to(hits))
        return hits / self.size[:, 0, 0]

    def _group(self, label: int) -> _Group:
        way = self.classes.shape[1]
        task, slot = (self.classes == label).nonzero(as_tuple=True)
        turns = torch.arange(1, way, device=slot.device)[:, None]
        margins = self.means.new_zeros(way - 1, len(task), len(self.data.of(label)))
        return _Group(label, task * way + slot, task * way + (slot + turns) % way, margins)

    def _over_images(self, move: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The mean cross-entropy (B, 1, 1) after v has moved, and its gradients along v (B, N, D) and the bias (B, N, 1)."""
        rows, along_v = move.flatten(0, 1), torch.zeros_like(move)
        loss, along_bias = torch.zeros_like(self.size), move.new_zeros(*move.shape[:2], 1)
        moved = bool(move.any())
        for group in self.groups:
            x = self.data.of(group.label)
            if moved:
                group.margins += _margins(rows, group, x)
            margins = group.margins if bias is None else group.margins + _differences(bias.flatten(), group)
            p, own, losses = _softmax(margins)
            loss.view(-1).index_add_(0, group.own // move.shape[1], losses.sum(1))
            _scatter(along_v.flatten(0, 1), group, (p.flatten(0, 1) @ x).view(*p.shape[:2], -1))
            if bias is not None:
                _scatter(along_bias.flatten(0, 1), group, p.sum(-1, keepdim=True))
            if self.calls % _REFRESHED_EVERY == 0:
                self._spread(group, p, own)
        return loss / self.size, along_v.div_(self.size), along_bias / self.size

    def _spread(self, group: _Group, p: Tensor, own: Tensor) -> None:
        """Note the sums over the class's images of p (1 - p), of each class of its tasks."""
        way, of_slot = len(p) + 1, self.spread.flatten(0, 1)
        of_slot[group.own, group.own % way] = (own * (1 - own)).sum(-1)
        of_slot[group.own, group.others % way] = (p * (1 - p)).sum(-1)

    def _curvature(self) -> Tensor:
        """(B, N, D): the diagonal, as if p (1 - p) were the same for all images of a class; evened out, because it is not."""
        diagonal = (self.spread / self.size).mT @ self.data.moments[self.classes]
        if isinstance(self.learner, LinearLearner):
            diagonal += self.learner.l2
        else:
            if self.learner.kind == "cosine":
                diagonal *= (self.learner.temperature / self.w.norm(dim=-1, keepdim=True)).square()
            elif self.learner.kind == "euclidean":
                diagonal *= 4
            diagonal += self.pull + _LEAST_CURVATURE * diagonal.mean((1, 2), keepdim=True)
        share = _EVENED_OUT if isinstance(self.learner, LinearLearner) else _EVENED_OUT_OF_PROTOTYPES
        return diagonal.pow(share) * diagonal.mean((1, 2), keepdim=True).pow(1 - share)

    def _penalty(self, w: Tensor) -> tuple[Tensor, float]:
        """From where, and how strongly, the weights are pulled away."""
        return (w, self.learner.l2) if isinstance(self.learner, LinearLearner) else (w - self.means, self.pull)


def _principal_axes(classes: list[Tensor]) -> Tensor:
    """(D, R): eigenvectors of the second moment of all classes together, the strongest first, as far as float32 tells it from zero."""
    moment = sum((x.double().T @ x.double() for x in classes), start=torch.zeros((), dtype=torch.float64, device=classes[0].device))
    if not moment.isfinite().all():
        # The losses will say so, task by task.
        return torch.eye(len(moment), dtype=classes[0].dtype, device=moment.device)
    strengths, axes = torch.linalg.eigh(moment)
    return axes[:, strengths > _NOTHING * strengths[-1]].flip(1).to(classes[0].dtype).contiguous()


def _as_logits(learner: Learner, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """v (B, N, D) and a bias (B, N), so that the logits are x . v + bias up to what is the same for all classes. Eq. 9."""
    if isinstance(learner, LinearLearner) or learner.kind == "dot":
        return w, None
    if learner.kind == "euclidean":
        return 2 * w, -w.square().sum(-1)
    return learner.temperature * F.normalize(w, dim=-1), None


def _pulled_back(learner: Learner, w: Tensor, along_v: Tensor, along_bias: Tensor) -> Tensor:
    """(B, N, D): the gradient along w, from those along v and the bias of `_as_logits`."""
    if isinstance(learner, LinearLearner) or learner.kind == "dot":
        return along_v
    if learner.kind == "euclidean":
        return 2 * (along_v - along_bias * w)
    norm = w.norm(dim=-1, keepdim=True)
    unit = w / norm
    return learner.temperature / norm * (along_v - (along_v * unit).sum(-1, keepdim=True) * unit)


def _margins(rows: Tensor, group: _Group, x: Tensor) -> Tensor:
    """(N - 1, b, M): x . (v of another class - v of its own)."""
    logits = (rows[torch.cat([group.own, group.others.flatten()])] @ x.T).view(-1, len(group.own), len(x))
    return logits[1:].sub_(logits[0])


def _softmax(margins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From margins (N - 1, b, M): the probabilities of the others, (N - 1, b, M), and of the own class, and its cross-entropy, (b, M)."""
    largest = margins.amax(0).clamp_(min=0)
    p, own = (margins - largest).exp_(), largest.neg().exp_()
    total = p.sum(0).add_(own)
    return p.div_(total), own.div_(total), total.log_().add_(largest)


def _differences(bias: Tensor, group: _Group) -> Tensor:
    return (bias[group.others] - bias[group.own])[..., None]


def _scatter(rows: Tensor, group: _Group, along_margins: Tensor) -> None:
    """Add what comes along the margins (N - 1, b, ...) to the others' rows, and take it off their own."""
    rows.index_add_(0, group.others.flatten(), along_margins.flatten(0, 1))
    rows.index_add_(0, group.own, along_margins.sum(0), alpha=-1)


@contextmanager
def _products(reduced: bool, device: torch.device) -> Iterator[None]:
    """Let matrix products of float32 round their factors; they sum in float32."""
    on_cpu = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backend, rounded = (torch.backends.cuda.matmul, "tf32") if device.type == "cuda" else (on_cpu, "bf16")
    before = backend.fp32_precision
    backend.fp32_precision = rounded if reduced else before
    try:
        yield
    finally:
        backend.fp32_precision = before
