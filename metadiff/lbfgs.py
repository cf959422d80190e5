"""L-BFGS on many small, independent problems in step (Nocedal and Wright, Numerical Optimization, Algorithms 7.4 and 7.5).

Shapes throughout: B problems, weights (B, N, D); one number a problem is (B, 1, 1).
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

_PAIRS = 6
_SUFFICIENT = 1e-4
_FLAT = 1e-6
_LESS_STEEP = 0.8
_CURVED = 1e-6
_WORTH_LEAVING_OUT = 0.25


class Objective(Protocol):
    """What to minimise, problem by problem."""

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The losses (B, 1, 1) and their gradients (B, N, D)."""
        ...

    def __getitem__(self, problems: Tensor) -> Self:
        """The objective of the problems that a (B,) mask picks."""
        ...

    def place(self, w: Tensor) -> Tensor:
        """The permitted point next to w; w itself where all are."""
        ...

    def precondition(self, gradient: Tensor) -> Tensor:
        """(B, N, D): a first guess of the inverse Hessian at the last point, times the gradient; a new tensor."""
        ...

    def converged(self, gradient: Tensor) -> Tensor:
        """(B,) bool: whether a gradient is small enough."""
        ...


@dataclass(eq=False)
class Minimum:
    """Where B problems have come to.

    Attributes:
        w: (B, N, D).
        loss: (B, 1, 1).
        gradient: (B, N, D).
        evaluations: (B,) int64, of loss and gradient.
    """

    w: Tensor
    loss: Tensor
    gradient: Tensor
    evaluations: Tensor

    @classmethod
    def nowhere(cls, w: Tensor) -> "Minimum":
        """At w, before any evaluation."""
        unknown = torch.full_like(w, torch.nan)
        return cls(w, unknown[:, :1, :1].clone(), unknown, torch.zeros(len(w), dtype=torch.int64, device=w.device))

    def __getitem__(self, problems: Tensor) -> "Minimum":
        return Minimum(*(value[problems] for value in vars(self).values()))

    def put(self, problems: Tensor, other: "Minimum") -> None:
        """Replace some of them."""
        for name, value in vars(self).items():
            value[problems] = getattr(other, name)


class _Pair(NamedTuple):
    """A change of w, that of the gradient (B, N, D), and 1 / s.y (B, 1, 1): 0 for a problem that has not changed, or not convexly."""

    s: Tensor
    y: Tensor
    rho: Tensor


@dataclass(eq=False)
class _Descent:
    """On the way there.

    Attributes:
        now: the best points so far.
        step: (B, 1, 1) the next to try.
        gamma: (B, 1, 1) the scale of the preconditioner.
        pairs: the latest, the newest last.
    """

    now: Minimum
    step: Tensor
    gamma: Tensor
    pairs: deque[_Pair]

    def __getitem__(self, problems: Tensor) -> "_Descent":
        pairs = deque((_Pair(*(value[problems] for value in pair)) for pair in self.pairs), _PAIRS)
        return _Descent(self.now[problems], self.step[problems], self.gamma[problems], pairs)


def minimise(objective: Objective, w: Tensor, max_evaluations: int) -> Minimum:
    """Descend from w until the objective calls a problem converged; a problem is not influenced by the others.

    A problem that is not finite at w, or not there after `max_evaluations`, is returned as it then is.
    """
    descent = _start(objective, w)
    best = descent.now[torch.ones(len(w), dtype=torch.bool, device=w.device)]
    left = torch.arange(len(w), device=w.device)
    for _ in range(max_evaluations - 1):
        going = ~objective.converged(descent.now.gradient) & descent.now.loss.isfinite().flatten()
        if int(going.sum()) <= (1 - _WORTH_LEAVING_OUT) * len(going):
            # The finished ones would be evaluated in vain; leaving them out costs a copy of the others, so not every time.
            best.put(left, descent.now)
            left, descent, objective, going = left[going], descent[going], objective[going], going[going]
            if not len(left):
                return best
        _advance(descent, objective, going)
    best.put(left, descent.now)
    return best


def _start(objective: Objective, w: Tensor) -> _Descent:
    loss, gradient = objective(w)
    loss = torch.where(gradient.isfinite().flatten(1).all(1)[:, None, None], loss, torch.nan)  # without a gradient, it leads nowhere
    # The preconditioner knows the scale: the first step is a whole one.
    ones = torch.ones_like(loss)
    return _Descent(Minimum(w, loss, gradient, torch.ones(len(w), dtype=torch.int64, device=w.device)), ones, ones, deque(maxlen=_PAIRS))


def _advance(descent: _Descent, objective: Objective, going: Tensor) -> None:
    """One evaluation for each problem: the trial step is taken, or halved for the next time."""
    now, direction = descent.now, _direction(descent, objective)
    w = objective.place(torch.addcmul(now.w, direction, descent.step))
    loss, gradient = objective(w)
    taken = _acceptable(descent, direction, loss, gradient) & going[:, None, None]
    _remember(descent, objective, w - now.w, gradient - now.gradient, taken)
    if not taken.all():
        w, loss, gradient = (torch.where(taken, *of) for of in ((w, now.w), (loss, now.loss), (gradient, now.gradient)))
    descent.now = Minimum(w, loss, gradient, now.evaluations + going)
    descent.step = torch.where(taken, 1.0, descent.step / 2)


def _direction(descent: _Descent, objective: Objective) -> Tensor:
    """-H g by the two-loop recursion."""
    q, alphas = descent.now.gradient.clone(), []
    for pair in reversed(descent.pairs):
        alphas.append(pair.rho * _dot(pair.s, q))
        q.addcmul_(pair.y, alphas[-1], value=-1)
    q = objective.precondition(q).mul_(descent.gamma)
    for pair, alpha in zip(descent.pairs, reversed(alphas), strict=True):
        q.addcmul_(pair.s, alpha - pair.rho * _dot(pair.y, q))
    return q.neg_()


def _acceptable(descent: _Descent, direction: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
    """Armijo's condition, or the slope's where the loss changes by less than float32 resolves (Hager and Zhang 2005, approximate Wolfe)."""
    now = descent.now
    slope, new_slope = _dot(now.gradient, direction), _dot(gradient, direction)
    lower = loss <= now.loss + _SUFFICIENT * descent.step * slope
    flatter = (loss <= now.loss + _FLAT * now.loss.abs()) & (new_slope.abs() <= _LESS_STEEP * slope.abs())
    return (lower | flatter) & new_slope.isfinite()


def _remember(descent: _Descent, objective: Objective, s: Tensor, y: Tensor, taken: Tensor) -> None:
    curvature = _dot(s, y)
    curved = taken & (curvature > _CURVED * (_dot(s, s) * _dot(y, y)).sqrt())
    if not curved.all():
        s, y = (torch.where(curved, change, 0.0) for change in (s, y))
    descent.pairs.append(_Pair(s, y, torch.where(curved, 1 / curvature, 0.0)))
    descent.gamma = torch.where(curved, curvature / _dot(y, objective.precondition(y)), descent.gamma)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))[:, None, None]
