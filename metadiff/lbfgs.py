"""L-BFGS on many small, independent problems in step (Nocedal and Wright, Numerical Optimization, Algorithms 7.4 and 7.5).

Shapes throughout: B problems, weights (B, N, D); one number a problem is (B, 1, 1).
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

_PAIRS = 10
_SUFFICIENT = 1e-4
_FLAT = 1e-6
_LESS_STEEP = 0.8
_CURVED = 1e-6


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

    @property
    def gradient_norm(self) -> Tensor:
        """(B,): the gradient's largest element."""
        return self.gradient.abs().amax((1, 2))

    def __getitem__(self, problems: Tensor) -> Self:
        return type(self)(**{name: value[problems] for name, value in vars(self).items()})


@dataclass(eq=False)
class _Descent(Minimum):
    """On the way there.

    `step` is the next to try and `gamma` the scale of the inverse Hessian, (B, 1, 1). `s` and `y` (B, 10, N, D) are the latest changes of
    w and gradient, `rho` (B, 10, 1, 1) is 1 / s.y, or 0 for no change yet.
    """

    step: Tensor
    gamma: Tensor
    s: Tensor
    y: Tensor
    rho: Tensor


def minimise(objective: Objective, w: Tensor, tolerance: float, max_evaluations: int) -> Minimum:
    """Descend from w until no element of a problem's gradient exceeds `tolerance`; a problem is not influenced by the others.

    A problem that is not finite at w, or not there after `max_evaluations`, is returned as it then is.
    """
    now = _start(objective, w)
    best = Minimum(now.w.clone(), now.loss.clone(), now.gradient.clone(), now.evaluations.clone())
    left = torch.arange(len(w), device=w.device)
    for _ in range(max_evaluations - 1):
        going = now.gradient_norm > tolerance
        if 2 * int(going.sum()) <= len(going):
            # The finished ones would be evaluated in vain; leaving them out costs a copy of the others' data, so not every time.
            _put(best, left, now)
            left, now, objective, going = left[going], now[going], objective[going], going[going]
            if not len(left):
                return best
        now = _advance(now, objective, going)
    _put(best, left, now)
    return best


def _start(objective: Objective, w: Tensor) -> _Descent:
    loss, gradient = objective(w)
    ones, pairs = torch.ones_like(loss), w.new_zeros(len(w), _PAIRS, *w.shape[1:])
    gamma = 1 / _dot(gradient, gradient).sqrt().clamp_min(1.0)
    return _Descent(
        w, loss, gradient, torch.ones(len(w), dtype=torch.int64, device=w.device), ones, gamma, pairs, pairs, pairs[..., :1, :1]
    )


def _put(best: Minimum, places: Tensor, now: Minimum) -> None:
    for name, value in vars(best).items():
        value[places] = getattr(now, name)


def _advance(now: _Descent, objective: Objective, going: Tensor) -> _Descent:
    """One evaluation for each problem: the trial step is taken, or halved for the next time."""
    direction = _direction(now)
    w = objective.place(now.w + now.step * direction)
    loss, gradient = objective(w)
    taken = _acceptable(now, direction, loss, gradient) & going[:, None, None]
    s, y = w - now.w, gradient - now.gradient
    curvature = _dot(s, y)
    curved = taken & (curvature > _CURVED * (_dot(s, s) * _dot(y, y)).sqrt())
    return _Descent(
        w=torch.where(taken, w, now.w),
        loss=torch.where(taken, loss, now.loss),
        gradient=torch.where(taken, gradient, now.gradient),
        evaluations=now.evaluations + going,
        step=torch.where(taken, 1.0, now.step / 2),
        gamma=torch.where(curved, curvature / _dot(y, y), now.gamma),
        s=_remember(now.s, s, curved),
        y=_remember(now.y, y, curved),
        rho=_remember(now.rho, 1 / curvature, curved),
    )


def _direction(now: _Descent) -> Tensor:
    """-H g by the two-loop recursion."""
    q, alphas = now.gradient, []
    for pair in reversed(range(_PAIRS)):
        alphas.append(now.rho[:, pair] * _dot(now.s[:, pair], q))
        q = q - alphas[-1] * now.y[:, pair]
    q = q * now.gamma
    for pair, alpha in enumerate(reversed(alphas)):
        q = q + (alpha - now.rho[:, pair] * _dot(now.y[:, pair], q)) * now.s[:, pair]
    return -q


def _acceptable(now: _Descent, direction: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
    """Armijo's condition, or the slope's where the loss changes by less than float32 resolves (Hager and Zhang 2005, approximate Wolfe)."""
    slope, new_slope = _dot(now.gradient, direction), _dot(gradient, direction)
    lower = loss <= now.loss + _SUFFICIENT * now.step * slope
    flatter = (loss <= now.loss + _FLAT * now.loss.abs()) & (new_slope.abs() <= _LESS_STEEP * slope.abs())
    return (lower | flatter) & new_slope.isfinite()


def _remember(pairs: Tensor, new: Tensor, where: Tensor) -> Tensor:
    return torch.where(where[:, None], torch.cat([pairs[:, 1:], new[:, None]], 1), pairs)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)
