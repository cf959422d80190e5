"""The class-grouped cross-entropy against the learners' own, on gathered images."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metadiff import grouped
from metadiff.grouped import ClassFeatures, GroupedObjective
from metadiff.lbfgs import minimise
from metadiff.learners import Learner, LinearLearner, PrototypeLearner, Support

SIZES = np.array([7, 12, 1, 9, 10, 4])
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])
DIM, WAY, TASKS = 6, 3, 8
CLASSES = torch.stack([torch.randperm(len(SIZES), generator=torch.Generator().manual_seed(task))[:WAY] for task in range(TASKS)])
CASES: dict[str, tuple[Learner, float]] = {
    "linear": (LinearLearner(l2=0.3), 0.0),
    "dot": (PrototypeLearner("dot"), 0.0),
    "dot, pull": (PrototypeLearner("dot"), 0.4),
    "euclidean": (PrototypeLearner("euclidean"), 0.0),
    "euclidean, pull": (PrototypeLearner("euclidean"), 0.4),
    "cosine": (PrototypeLearner("cosine", 7.0), 0.0),
    "cosine, pull": (PrototypeLearner("cosine", 7.0), 0.4),
}
EACH_CASE = pytest.mark.parametrize(("learner", "pull"), CASES.values(), ids=CASES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


FEATURES = randn(int(SIZES.sum()), DIM) * torch.linspace(0.5, 1.5, DIM) + 0.3


def objective(
    learner: Learner, pull: float = 0.0, features: Tensor = FEATURES, classes: Tensor = CLASSES, **settings: Any
) -> GroupedObjective:
    unit = isinstance(learner, PrototypeLearner) and learner.kind == "cosine"
    return GroupedObjective(ClassFeatures(features, OFFSETS, unit), classes, learner, pull, **settings)


def gathered(classes: Tensor = CLASSES, features: Tensor = FEATURES) -> Support:
    """All images of each task's classes, padded to the same number."""
    rows = [torch.cat([torch.arange(*OFFSETS[each : each + 2].tolist()) for each in task]) for task in classes.tolist()]
    labels = [torch.arange(classes.shape[1]).repeat_interleave(torch.from_numpy(SIZES[task])) for task in classes.numpy()]
    padded = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=fill) for each, fill in ((rows, 0), (labels, -1)))
    indices, y = padded
    return Support.of(features[indices].double(), y, classes.shape[1])


def plain(learner: Learner, pull: float, w: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """The losses (B, 1, 1) and gradients (B, N, D), in float64."""
    away = w.double() - support.means
    loss = learner.ce_loss(w.double(), support) + pull / 2 * away.square().sum((1, 2))
    return loss[:, None, None], learner.ce_gradient(w.double(), support) + pull * away


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EACH_CASE
def test_losses_and_gradients_equal_those_on_gathered_images(learner: Learner, pull: float, dtype: torch.dtype) -> None:
    """Margins move along with the weights, and stay behind with the tasks that are picked: so several moves, and several picks."""
    ours, classes = objective(learner, pull, FEATURES.to(dtype)), CLASSES
    near = 1e-10 if dtype == torch.float64 else 2e-5
    picks = {3: torch.tensor([1, 0, 1, 1, 0, 1, 0, 1]), 7: torch.tensor([0, 1, 0, 1, 1]), 9: torch.tensor([0, 0, 1])}
    for turn in range(12):
        if turn in picks:
            mask = picks[turn].bool()
            ours, classes = ours[mask], classes[mask]
        w = randn(len(classes), WAY, DIM, seed=turn, dtype=dtype)
        loss, gradient = ours(w @ ours.data.rotation)
        expected = plain(learner, pull, w, gathered(classes, FEATURES.to(dtype)))
        assert (loss.dtype, gradient.dtype) == (dtype, dtype)
        torch.testing.assert_close((loss.double(), (gradient @ ours.data.rotation.T).double()), expected, rtol=near, atol=near)


def test_picking_leaves_the_objective_of_all_as_it_was() -> None:
    learner = LinearLearner()
    ours, w = objective(learner), randn(TASKS, WAY, DIM, seed=1)
    ours(w @ ours.data.rotation)
    some = ours[torch.arange(TASKS) % 3 == 0]
    some(randn(3, WAY, DIM, seed=2) @ ours.data.rotation)
    torch.testing.assert_close(ours(w @ ours.data.rotation)[0], plain(learner, 0.0, w, gathered())[0])


def test_margins_beyond_the_range_of_the_exponential_stay_finite() -> None:
    """Those of two classes, of which the greater one has all the probability."""
    learner, x, classes = LinearLearner(l2=0.1), FEATURES.float(), CLASSES[:, :2]
    ours, w = objective(learner, features=x, classes=classes), 1e3 * randn(TASKS, 2, DIM, dtype=torch.float32)
    loss, gradient = ours(w @ ours.data.rotation)
    expected, along = plain(learner, 0.0, w, gathered(classes, x))
    assert float((expected - learner.l2 / 2 * w.double().square().sum((1, 2), keepdim=True)).min()) > 100
    assert bool(loss.isfinite().all())
    torch.testing.assert_close((gradient @ ours.data.rotation.T).double(), along, rtol=1e-4, atol=1e-3)


@EACH_CASE
def test_the_start_is_nothing_or_the_class_means(learner: Learner, pull: float) -> None:
    ours = objective(learner, pull)
    expected = torch.zeros(TASKS, WAY, DIM).double() if isinstance(learner, LinearLearner) else gathered().means
    torch.testing.assert_close(ours.start @ ours.data.rotation.T, expected)


@EACH_CASE
def test_only_the_free_lengths_of_the_cosine_are_held(learner: Learner, pull: float) -> None:
    ours, w = objective(learner, pull), randn(TASKS, WAY, DIM)
    ours(ours.start)
    placed, means = ours.place(w), gathered().means
    held = isinstance(learner, PrototypeLearner) and learner.kind == "cosine" and not pull
    expected = w * (means.norm(dim=-1) / w.norm(dim=-1))[..., None] if held else w
    torch.testing.assert_close(placed, expected)


def test_a_prototype_under_the_cosine_keeps_away_from_zero() -> None:
    ours = objective(PrototypeLearner("cosine"), 0.4)
    means = gathered().means @ ours.data.rotation
    w, least = means.clone(), grouped._SHORTEST * means.norm(dim=-1)
    w[:, 1] *= 0.01 * grouped._SHORTEST
    placed = ours.place(w)
    torch.testing.assert_close(placed[:, 1].norm(dim=-1), least[:, 1])
    torch.testing.assert_close(torch.cosine_similarity(placed, w, -1), torch.ones(TASKS, WAY).double())
    assert torch.equal(placed[:, [0, 2]], w[:, [0, 2]])


def test_reduced_moves_have_the_bits_that_reduced_products_keep() -> None:
    ours = objective(LinearLearner(), features=FEATURES.float(), reduced=True)
    w = randn(TASKS, WAY, DIM, dtype=torch.float32)
    ours(ours.start)
    first = ours.place(w)
    assert torch.equal(first, first.bfloat16().float())
    torch.testing.assert_close(first, w, rtol=2**-8, atol=0)
    ours(first)
    second = ours.place(w + 1e-3)
    torch.testing.assert_close(second, w + 1e-3, rtol=0, atol=2**-8 * float((w + 1e-3 - first).abs().max()) + 1e-6)


def second_moments(learner: Learner, w: Tensor) -> Tensor:
    """(B, N, D) the diagonal that the Hessian of the cross-entropy along the logits' factors would have if each class had one p (1 - p).

    In the axes of the principal directions; one task and one class at a time.
    """
    unit = isinstance(learner, PrototypeLearner) and learner.kind == "cosine"
    x = torch.nn.functional.normalize(FEATURES, dim=-1) if unit else FEATURES
    rotated = x @ ClassFeatures(FEATURES, OFFSETS, unit).rotation
    diagonal = torch.zeros_like(w)
    for task, classes in enumerate(CLASSES.tolist()):
        for each in classes:
            rows = slice(*OFFSETS[each : each + 2].tolist())
            p = learner.logits(w[task][None], FEATURES[rows][None])[0].softmax(-1)
            spread = (p * (1 - p)).sum(0) / SIZES[classes].sum()
            diagonal[task] += spread[:, None] * rotated[rows].square().mean(0)
    return diagonal


@EACH_CASE
def test_the_preconditioner_is_the_evened_out_diagonal(learner: Learner, pull: float) -> None:
    ours, w = objective(learner, pull), randn(TASKS, WAY, DIM, seed=3)
    ours(w @ ours.data.rotation)
    diagonal = second_moments(learner, w)
    if isinstance(learner, LinearLearner):
        diagonal += learner.l2
    else:
        scales = {"dot": 1.0, "euclidean": 4.0, "cosine": (learner.temperature / w.norm(dim=-1, keepdim=True)) ** 2}
        diagonal *= scales[learner.kind]
        diagonal += pull + grouped._LEAST_CURVATURE * diagonal.mean((1, 2), keepdim=True)
    share = grouped._EVENED_OUT if isinstance(learner, LinearLearner) else grouped._EVENED_OUT_OF_PROTOTYPES
    diagonal, g = diagonal**share * diagonal.mean((1, 2), keepdim=True) ** (1 - share), randn(TASKS, WAY, DIM, seed=4)
    if isinstance(learner, LinearLearner) or learner.kind != "cosine":
        expected = g / diagonal
    else:
        unit = ours.w / ours.w.norm(dim=-1, keepdim=True)
        onto = torch.eye(DIM).double() - unit[..., :, None] * unit[..., None, :]
        across = (onto @ ((onto @ g[..., None]) / diagonal[..., None]))[..., 0]
        expected = across + (g * unit).sum(-1, keepdim=True) * unit / (pull or diagonal.mean((1, 2), keepdim=True))
    torch.testing.assert_close(ours.precondition(g), expected)


def test_the_diagonal_is_that_of_the_hessian_where_all_probabilities_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_EVENED_OUT", 1.0)
    learner = LinearLearner(l2=0.3)
    ours = objective(learner)
    ours(ours.start)
    rotated = gathered(features=FEATURES @ ours.data.rotation)
    hessian = torch.autograd.functional.hessian(lambda w: learner.ce_loss(w, rotated).sum(), torch.zeros(TASKS, WAY, DIM).double())
    assert isinstance(hessian, Tensor)
    diagonal = hessian.reshape(TASKS * WAY * DIM, -1).diagonal().view(TASKS, WAY, DIM)
    torch.testing.assert_close(ours.precondition(torch.ones_like(diagonal)), 1 / diagonal)


def test_the_preconditioner_follows_the_weights() -> None:
    learner, ones = PrototypeLearner("euclidean"), torch.ones(TASKS, WAY, DIM).double()
    ours, later = objective(learner, 0.1), objective(learner, 0.1)
    w = randn(TASKS, WAY, DIM, seed=5)
    ours(ours.start)
    before = ours.precondition(ones)
    for _ in range(grouped._REFRESHED_EVERY):
        ours(w)
    later(w)
    assert not torch.allclose(before, later.precondition(ones), rtol=0.01)
    torch.testing.assert_close(ours.precondition(ones), later.precondition(ones))
    # Those that are picked keep theirs.
    picked = torch.arange(TASKS) % 2 == 0
    torch.testing.assert_close(ours[picked].precondition(ones[picked]), ours.precondition(ones)[picked])


def test_a_task_has_converged_when_no_element_in_the_features_axes_is_large() -> None:
    ours, tolerance = objective(PrototypeLearner("euclidean"), tolerance=1e-3), 1e-3
    shares = torch.tensor([0.0, 0.3, 0.99, 1.01, 3.0, 1e3, torch.inf, torch.nan], dtype=torch.float64)
    peaks = torch.zeros(TASKS, WAY, DIM).double()
    peaks[:, 1, 2] = shares * tolerance
    peaks[2, 0, 0] = 0.99 * tolerance  # longer than the tolerance, and yet none is larger
    gradient = peaks[:6] @ ours.data.rotation
    few = ours[torch.arange(TASKS) < 6]
    torch.testing.assert_close(few.largest(gradient), peaks[:6].abs().amax((1, 2)))
    assert few.converged(gradient).tolist() == [True, True, True, False, False, False]
    assert ours.converged(peaks).tolist() == [*few.converged(peaks[:6]).tolist(), False, False]


@pytest.mark.parametrize("kind", ["linear", "dot"])
def test_no_task_is_called_converged_too_early(kind: str) -> None:
    tolerance, gap, l2 = 1e-3, 1e-6, 0.3
    learner = LinearLearner(l2) if kind == "linear" else PrototypeLearner("dot")
    ours = objective(learner, tolerance=tolerance, gap=gap)
    for seed, scale in enumerate(torch.logspace(-5, 0, 40).tolist()):
        gradient = scale * randn(TASKS, WAY, DIM, seed=seed)
        largest = (gradient @ ours.data.rotation.T).abs().amax((1, 2))
        close = gradient.square().sum((1, 2)) / (2 * l2) <= gap if kind == "linear" else torch.zeros(TASKS).bool()
        converged = ours.converged(gradient)
        assert not (converged & ~close & (largest > tolerance)).any()
        assert (converged | ~close).all()
        assert (converged | (largest > tolerance / 3)).all()


def test_a_task_whose_gradient_falls_no_further_is_done_in_reduced_precision_alone() -> None:
    rounded, full = (objective(LinearLearner(), tolerance=1e-9, reduced=reduced) for reduced in (True, False))
    shares = torch.tensor([1.0, 0.5]).double().repeat(TASKS // 2)[:, None, None]
    falling = [shares**turn * randn(TASKS, WAY, DIM) for turn in range(grouped._PATIENCE + 1)]
    for turn, gradient in enumerate(falling):
        assert not full.converged(gradient).any()
        assert rounded.converged(gradient).tolist() == [turn == grouped._PATIENCE, False] * (TASKS // 2)
    picked = rounded[torch.arange(TASKS) < 3]
    assert picked.converged(falling[-1][:3]).tolist() == [True, False, True]


def test_the_gap_is_for_linear_learners_alone() -> None:
    gradient = torch.full((TASKS, WAY, DIM), 1e-2).double()
    bound = float(gradient[0].square().sum()) / (2 * 0.3)
    for learner, gap, expected in ((LinearLearner(0.3), 1.01, True), (LinearLearner(0.3), 0.99, False), (PrototypeLearner(), 1.01, False)):
        assert objective(learner, gap=gap * bound).converged(gradient).tolist() == [expected] * TASKS


@EACH_CASE
def test_accuracy_is_the_share_of_the_images_whose_own_class_wins(learner: Learner, pull: float) -> None:
    ours, support = objective(learner, pull), gathered()
    w = support.means + 0.3 * randn(TASKS, WAY, DIM, seed=6)
    hits = (learner.logits(w, support.features).argmax(-1) == support.labels) & (support.labels >= 0)
    expected = hits.sum(1) / support.size
    assert 0.2 < float(expected.min()) < float(expected.max()) < 1.0
    torch.testing.assert_close(ours.accuracy(w @ ours.data.rotation), expected)


@EACH_CASE
def test_features_of_deficient_rank_give_the_same_fits(learner: Learner, pull: float) -> None:
    """Six dimensions, placed askew among nine, and two that no feature has: it is the same problem."""
    pull = 0.0 if isinstance(learner, LinearLearner) else pull or 0.05  # so that the fits are finite
    askew = torch.linalg.qr(randn(9, 9, seed=7))[0][:DIM]
    wide = torch.cat([FEATURES @ askew, torch.zeros(len(FEATURES), 2)], 1).float()
    narrow_fit, wide_fit = objective(learner, pull, FEATURES.float()), objective(learner, pull, wide)
    assert wide_fit.data.rotation.shape == (11, DIM)
    torch.testing.assert_close(wide_fit.data.rotation.T @ wide_fit.data.rotation, torch.eye(DIM), rtol=0, atol=1e-6)
    fits = [minimise(each, each.start, 300).w @ each.data.rotation.T for each in (narrow_fit, wide_fit)]
    assert bool(fits[1].isfinite().all())
    torch.testing.assert_close(fits[1][..., :9], fits[0] @ askew.float(), rtol=0, atol=2e-4)
    torch.testing.assert_close(fits[1][..., 9:], torch.zeros(TASKS, WAY, 2), rtol=0, atol=1e-6)


class Products(TorchDispatchMode):
    """Counts matrix products, and notes the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)
        self.largest = max([self.largest, *(each.numel() for each in tree_leaves(given) if isinstance(each, Tensor))])
        return given


def test_no_tasks_images_are_gathered() -> None:
    """Two products a class, however many tasks: what they give is of the size of the weights, or of one class's margins."""
    tasks, dim = 300, 32
    classes = torch.stack([torch.randperm(len(SIZES), generator=torch.Generator().manual_seed(task))[:WAY] for task in range(tasks)])
    ours = objective(LinearLearner(), features=randn(int(SIZES.sum()), dim), classes=classes)
    w = randn(tasks, WAY, ours.data.x.shape[1])
    with_a_class = int(classes.flatten().bincount().max())
    margins = WAY * with_a_class * int(SIZES.max())
    with Products() as products:
        minimum = minimise(ours, w, 4)
    assert minimum.evaluations.tolist() == [4] * tasks
    assert products.largest <= max(w.numel(), WAY * with_a_class * dim, margins)
    assert products.largest < 0.15 * int(gathered_sizes(classes).sum()) * dim
    # Four evaluations, and at most four times the one that tells whether a gradient is small enough, plus the preconditioner's.
    assert 2 * 4 * len(SIZES) <= products.count <= 2 * 4 * len(SIZES) + 8


def gathered_sizes(classes: Tensor) -> Tensor:
    return torch.from_numpy(SIZES)[classes].sum(1)


def test_reduced_precision_is_left_behind() -> None:
    backend = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, seen = backend.fp32_precision, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                seen.append(backend.fp32_precision)
            return func(*args, **(kwargs or {}))

    for reduced in (True, False):
        ours = objective(LinearLearner(), features=FEATURES.float(), reduced=reduced)
        seen.clear()
        with Watch():
            ours(randn(TASKS, WAY, DIM, dtype=torch.float32))
        assert set(seen) == {"bf16" if reduced else before}
        assert backend.fp32_precision == before


def test_aiming_takes_the_gradient_that_is_known() -> None:
    learner = PrototypeLearner("euclidean")
    ours = objective(learner, 0.1, FEATURES.float(), reduced=True)
    w = randn(TASKS, WAY, DIM, dtype=torch.float32)
    known = randn(TASKS, WAY, DIM, seed=1, dtype=torch.float32)
    ours.aim(w, known)
    torch.testing.assert_close(ours(w)[1], known, rtol=1e-5, atol=1e-5)
    # The loss bends along: its difference from one point to the next is still that of its gradient.
    loss, gradient = ours(w)
    step = 1e-2 * randn(TASKS, WAY, DIM, seed=2, dtype=torch.float32)
    further, there = ours(w + step)
    expected = ((gradient + there) / 2 * step).sum((1, 2), keepdim=True)
    torch.testing.assert_close(further - loss, expected, rtol=0, atol=2e-3 * float(expected.abs().max()) + 1e-4)


def test_aiming_without_one_aims_no_lower_than_rounding_allows() -> None:
    ours = objective(LinearLearner(), features=FEATURES.float(), reduced=True, tolerance=1e-9)
    ours.aim(ours.start, None)
    largest = ours.largest(ours(ours.start)[1])
    torch.testing.assert_close(ours.tolerance, grouped._LOWEST * largest)
    lenient = objective(LinearLearner(), features=FEATURES.float(), reduced=True, tolerance=1.0)
    lenient.aim(lenient.start, None)
    assert lenient.tolerance.tolist() == [1.0] * TASKS
