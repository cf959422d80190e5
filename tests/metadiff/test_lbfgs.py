"""Batched L-BFGS on functions whose minima are known, and whose full steps overshoot."""

from collections.abc import Callable
from typing import Self

import pytest
import torch
from torch import Tensor

from metadiff.lbfgs import Minimum, minimise

TOLERANCE = 1e-4


class Functions:
    """One function of the rows of (B, 1, D), with gradients by autograd; `calls` are the problems in each evaluation."""

    def __init__(self, function: Callable[[Tensor], Tensor], calls: list[int], tolerance: float = TOLERANCE) -> None:
        self.function, self.calls, self.tolerance = function, calls, tolerance

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

    def precondition(self, gradient: Tensor) -> Tensor:
        return gradient.clone()

    def converged(self, gradient: Tensor) -> Tensor:
        return largest(gradient) <= self.tolerance


def largest(gradient: Tensor) -> Tensor:
    return gradient.abs().amax((1, 2))


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
    found = minimise(Functions(rosenbrock, []), ROSENBROCK, 300)
    assert float(largest(found.gradient).max()) <= TOLERANCE
    torch.testing.assert_close(found.w, torch.ones_like(found.w), rtol=0, atol=1e-2)
    assert int(found.evaluations.max()) < 100


def test_steps_out_of_the_domain_are_halved() -> None:
    found = minimise(Functions(barrier, [], 1e-3), starts([0.5, 0.02], [0.1, 3.0]), 300)
    torch.testing.assert_close(found.w, torch.full_like(found.w, 0.01), rtol=1e-3, atol=0)


def test_the_loss_never_rises() -> None:
    losses = torch.stack([minimise(Functions(bowl, []), starts([3.0] * 6, [-1.0] * 6), n).loss.flatten() for n in range(1, 30)])
    assert (losses.diff(dim=0) <= 1e-6 * losses[:-1]).all()
    assert (losses[-1] < 1e-3 * losses[0]).all()


@pytest.mark.parametrize("limit", [1, 7])
def test_evaluations_are_counted_and_limited(limit: int) -> None:
    calls: list[int] = []
    found = minimise(Functions(rosenbrock, calls), ROSENBROCK, limit)
    assert len(calls) == limit
    # The fourth begins at the minimum.
    assert found.evaluations.tolist() == [limit, limit, limit, 1, limit]


def test_finished_problems_are_left_out() -> None:
    calls: list[int] = []
    begin = torch.cat([ROSENBROCK[:1], ROSENBROCK[3:4].expand(7, -1, -1)])
    found = minimise(Functions(rosenbrock, calls), begin, 300)
    assert calls[0] == 8
    assert set(calls[1:]) == {1}
    torch.testing.assert_close(found.w, torch.ones_like(found.w), rtol=0, atol=1e-2)


@pytest.mark.parametrize("others", [1, 7], ids=["left out", "carried along"])
def test_what_is_not_finite_is_returned_and_disturbs_nobody(others: int) -> None:
    begin = starts([-1.0, 1.0], *([0.5, 0.1 * k] for k in range(5, 5 + others)))
    calls: list[int] = []
    found = minimise(Functions(barrier, calls, 1e-3), begin, 100)
    assert bool(found.loss[0].isnan())
    assert calls[1] == (1 if others == 1 else 8)
    alone = minimise(Functions(barrier, [], 1e-3), begin[1:], 100)
    torch.testing.assert_close(found.w[1:], alone.w)
    torch.testing.assert_close(found.w[1:], torch.full_like(alone.w, 0.01), rtol=1e-3, atol=0)


def test_a_finite_loss_without_a_gradient_is_given_up_at_once() -> None:
    def root(x: Tensor) -> Tensor:
        return x.abs().sqrt().sum(1)

    calls: list[int] = []
    found = minimise(Functions(root, calls), starts([0.0, 0.0]), 100)
    assert calls == [1]
    assert bool(found.loss.isnan().all())


def test_a_preconditioner_that_knows_the_hessian_makes_newton_steps() -> None:
    scales = torch.logspace(-2, 3, 20)

    class Known(Functions):
        def precondition(self, gradient: Tensor) -> Tensor:
            return gradient / scales

    def ellipsoid(x: Tensor) -> Tensor:
        return (scales * (x - 1).square()).sum(1) / 2

    begin = torch.randn(3, 1, 20, generator=torch.Generator().manual_seed(0))
    found = minimise(Known(ellipsoid, [], 1e-3), begin, 100)
    assert found.evaluations.tolist() == [2, 2, 2]
    torch.testing.assert_close(found.w, torch.ones_like(begin), rtol=0, atol=1e-4)
    assert int(minimise(Functions(ellipsoid, [], 1e-3), begin, 100).evaluations.min()) > 10


def test_a_preconditioner_of_the_wrong_scale_is_put_right() -> None:
    class Misjudged(Functions):
        def precondition(self, gradient: Tensor) -> Tensor:
            return 1e-3 * gradient

    found = minimise(Misjudged(rosenbrock, []), ROSENBROCK, 300)
    assert float(largest(found.gradient).max()) <= TOLERANCE
    assert int(found.evaluations.max()) < 100


def test_a_descent_that_its_pairs_mislead_begins_anew() -> None:
    """After six evaluations of a bowl, a steep one elsewhere: of what the pairs say, nothing is true of it."""

    class Turning(Functions):
        def __call__(self, w: Tensor) -> tuple[Tensor, Tensor]:
            self.function = bowl if len(self.calls) < 6 else steep
            return super().__call__(w)

    def steep(x: Tensor) -> Tensor:
        return 1e3 * (x + 2).square().sum(1) - 1e6

    found = minimise(Turning(bowl, [], 0.1), starts([3.0] * 6), 300)
    torch.testing.assert_close(found.w, torch.full_like(found.w, -2.0), rtol=0, atol=1e-3)


def test_the_loss_and_gradient_are_those_of_the_point() -> None:
    for limit in (1, 4, 300):
        found = minimise(Functions(rosenbrock, []), ROSENBROCK, limit)
        loss, gradient = Functions(rosenbrock, [])(found.w)
        torch.testing.assert_close(found.loss, loss, rtol=0, atol=0)
        torch.testing.assert_close(found.gradient, gradient, rtol=0, atol=0)


def test_minima_are_put_in_place() -> None:
    w = torch.arange(6.0).reshape(3, 1, 2)
    all_of_them = Minimum.nowhere(w)
    assert all_of_them.evaluations.tolist() == [0, 0, 0]
    assert bool(all_of_them.loss.isnan().all())
    assert all_of_them.loss.shape == (3, 1, 1)
    last = Minimum(-w[2:], torch.ones(1, 1, 1), w[2:] + 1, torch.tensor([5]))
    all_of_them.put(torch.tensor([2]), last)
    torch.testing.assert_close(vars(all_of_them[torch.tensor([2])]), vars(last))
    assert all_of_them.evaluations.tolist() == [0, 0, 5]
    assert bool(all_of_them.gradient[:2].isnan().all())


def test_the_point_to_evaluate_is_the_one_that_place_permits() -> None:
    class OnCircle(Functions):
        def place(self, w: Tensor) -> Tensor:
            return w / w.norm(dim=-1, keepdim=True)

    # |x| does not matter to the cosine with (3, 4), so its gradient is along the circle.
    target = torch.tensor([0.6, 0.8])
    found = minimise(OnCircle(lambda x: -(x @ target) / x.norm(dim=1), []), starts([1.0, 0.0], [0.0, -1.0]), 100)
    torch.testing.assert_close(found.w, target.expand(2, 1, 2), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.w.norm(dim=-1), torch.ones(2, 1))
