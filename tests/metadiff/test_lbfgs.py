"""Batched L-BFGS on functions whose minima are known, and whose full steps overshoot."""

from collections.abc import Callable
from typing import Self

import pytest
import torch
from torch import Tensor

from metadiff.lbfgs import minimise

TOLERANCE = 1e-4


class Functions:
    """One function of the rows of (B, 1, D), with gradients by autograd; `calls` are the problems in each evaluation."""

    def __init__(self, function: Callable[[Tensor], Tensor], calls: list[int]) -> None:
        self.function, self.calls = function, calls

    def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(len(w))
        w = w.detach().requires_grad_()
        loss = self.function(w[:, 0])[:, None, None]
        (gradient,) = torch.autograd.grad(loss.sum(), w)
        return loss.detach(), gradient

    def __getitem__(self, problems: Tensor) -> Self:
        return self

    def place(self, w: Tensor) -> Tensor:
        return w


def rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2


def barrier(x: Tensor) -> Tensor:
    """Not a number below 0; the minimum is at 0.01."""
    return (100 * x - x.log()).sum(1)


def bowl(x: Tensor) -> Tensor:
    return (x**4).sum(1) + (x * torch.logspace(-1, 1, x.shape[1])).square().sum(1)


def starts(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[:, None]


ROSENBROCK = starts([-1.2, 1.0], [0.0, 0.0], [2.0, -1.0], [1.0, 1.0], [-3.0, 4.0])


def test_curved_valleys_are_followed() -> None:
    found = minimise(Functions(rosenbrock, []), ROSENBROCK, TOLERANCE, 300)
    assert float(found.gradient_norm.max()) <= TOLERANCE
    torch.testing.assert_close(found.w, torch.ones_like(found.w), rtol=0, atol=1e-2)
    assert int(found.evaluations.max()) < 100


def test_steps_out_of_the_domain_are_halved() -> None:
    found = minimise(Functions(barrier, []), starts([0.5, 0.02], [0.1, 3.0]), 1e-3, 300)
    torch.testing.assert_close(found.w, torch.full_like(found.w, 0.01), rtol=1e-3, atol=0)


def test_the_loss_never_rises() -> None:
    losses = torch.stack([minimise(Functions(bowl, []), starts([3.0] * 6, [-1.0] * 6), TOLERANCE, n).loss.flatten() for n in range(1, 30)])
    assert (losses.diff(dim=0) <= 1e-6 * losses[:-1]).all()
    assert (losses[-1] < 1e-3 * losses[0]).all()


@pytest.mark.parametrize("limit", [1, 7])
def test_evaluations_are_counted_and_limited(limit: int) -> None:
    calls: list[int] = []
    found = minimise(Functions(rosenbrock, calls), ROSENBROCK, TOLERANCE, limit)
    assert len(calls) == limit
    # The fourth begins at the minimum.
    assert found.evaluations.tolist() == [limit, limit, limit, 1, limit]


def test_finished_problems_are_left_out() -> None:
    calls: list[int] = []
    begin = torch.cat([ROSENBROCK[:1], ROSENBROCK[3:4].expand(7, -1, -1)])
    found = minimise(Functions(rosenbrock, calls), begin, TOLERANCE, 300)
    assert calls[0] == 8
    assert set(calls[1:]) == {1}
    torch.testing.assert_close(found.w, torch.ones_like(found.w), rtol=0, atol=1e-2)


def test_what_is_not_finite_is_returned_and_disturbs_nobody() -> None:
    begin = starts([-1.0, 1.0], [0.5, 0.5])
    found = minimise(Functions(barrier, []), begin, 1e-3, 100)
    assert bool(found.loss[0].isnan())
    alone = minimise(Functions(barrier, []), begin[1:], 1e-3, 100)
    torch.testing.assert_close(found.w[1:], alone.w)


def test_the_point_to_evaluate_is_the_one_that_place_permits() -> None:
    class OnCircle(Functions):
        def place(self, w: Tensor) -> Tensor:
            return w / w.norm(dim=-1, keepdim=True)

    # |x| does not matter to the cosine with (3, 4), so its gradient is along the circle.
    target = torch.tensor([0.6, 0.8])
    found = minimise(OnCircle(lambda x: -(x @ target) / x.norm(dim=1), []), starts([1.0, 0.0], [0.0, -1.0]), TOLERANCE, 100)
    torch.testing.assert_close(found.w, target.expand(2, 1, 2), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.w.norm(dim=-1), torch.ones(2, 1))
