"""Targets: fits against scikit-learn and scipy in float64, independence from the block, and resuming after a kill."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from metadiff import artifact, targets
from metadiff.artifact import Artifact
from metadiff.episodes import EpisodeSampler
from metadiff.errors import UserError
from metadiff.learners import Learner, LinearLearner, PrototypeLearner
from metadiff.targets import FittedTargets, Targets, TargetsConfig, class_means, fit_targets, target_scale, write_targets

SIZES = np.array([12, 30, 18, 25, 9, 21])
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)])
DIM, WAY, TASKS = 8, 4, 11
CLASSES = EpisodeSampler(OFFSETS, WAY, 1, 1, 0).classes(np.arange(TASKS))
LINEAR = LinearLearner(l2=1e-2)


def base_features() -> Tensor:
    """Overlapping classes at the default scale, standard deviation 0.1."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(SIZES), DIM, generator=generator).repeat_interleave(torch.tensor(SIZES), 0)
    x = centres + torch.randn(int(SIZES.sum()), DIM, generator=generator)
    return 0.1 * (x - x.mean(0)) / x.std()


FEATURES = base_features()


def ce(**settings: object) -> TargetsConfig:
    return TargetsConfig(**{"kind": "ce", "num_tasks": TASKS, "block": 4, **settings})  # type: ignore[arg-type]


def examples(classes: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """All images of one task's classes and their labels, float64."""
    rows = np.concatenate([np.arange(*OFFSETS[each : each + 2].tolist()) for each in classes])
    return FEATURES[rows].double(), torch.arange(len(classes)).repeat_interleave(torch.tensor(SIZES[classes]))


def own_objective(w: Tensor, classes: NDArray[np.int64], learner: Learner, pull: float) -> Tensor:
    """The loss of w (N, D) float64, written anew with torch's cross-entropy."""
    x, y = examples(classes)
    if isinstance(learner, LinearLearner):
        return F.cross_entropy(x @ w.T, y) + learner.l2 / 2 * w.square().sum()
    if learner.kind == "cosine":
        logits = learner.temperature * F.cosine_similarity(x[:, None], w[None], dim=-1)
    else:
        logits = -torch.cdist(x, w).square()
    means = torch.stack([x[y == k].mean(0) for k in range(len(classes))])
    return F.cross_entropy(logits, y) + pull / 2 * (w - means).square().sum()


def reference_minimum(classes: NDArray[np.int64], learner: Learner, pull: float) -> float:
    """The least loss that scipy finds in float64, from the class means on."""
    x, y = examples(classes)
    start = torch.stack([x[y == k].mean(0) for k in range(WAY)])

    def loss_and_gradient(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = torch.tensor(flat).reshape(WAY, DIM).requires_grad_()
        loss = own_objective(w, classes, learner, pull)
        (gradient,) = torch.autograd.grad(loss, w)
        return loss.item(), gradient.numpy().ravel()

    found = minimize(
        loss_and_gradient, start.numpy().ravel(), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 5000}
    )
    return float(found.fun)


FITS: list[tuple[Learner, float]] = [
    (LINEAR, 0.0),
    (PrototypeLearner("cosine"), 0.0),
    (PrototypeLearner("cosine"), 0.1),
    (PrototypeLearner("euclidean"), 0.1),
]


@lru_cache
def fitted_to_all(learner: Learner, pull: float = 0.0) -> FittedTargets:
    return fit_targets(FEATURES, OFFSETS, CLASSES, learner, ce(pull=pull))


NAMES = ["linear", "cosine", "cosine-pull", "euclidean-pull"]


def test_class_means_minimise_eq_11() -> None:
    means = class_means(FEATURES, OFFSETS)
    for k in range(len(SIZES)):
        torch.testing.assert_close(means[k], FEATURES[OFFSETS[k] : OFFSETS[k + 1]].double().mean(0).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("learner", "pull"), FITS, ids=NAMES)
def test_gradient_vanishes_at_the_fit(learner: Learner, pull: float) -> None:
    fitted = fitted_to_all(learner, pull)
    assert float(fitted.gradient_norm.max()) <= 1e-5
    assert int(fitted.iterations.max()) < 500
    for task, classes in enumerate(CLASSES):
        w = fitted.w[task].double().requires_grad_()
        (gradient,) = torch.autograd.grad(own_objective(w, classes, learner, pull), w)
        assert float(gradient.abs().max()) <= 1.1e-5  # rounding in float32


@pytest.mark.parametrize(("learner", "pull"), FITS, ids=NAMES)
def test_fits_match_scipy(learner: Learner, pull: float) -> None:
    fitted = fitted_to_all(learner, pull)
    for task, classes in enumerate(CLASSES[:2]):
        expected = reference_minimum(classes, learner, pull)
        assert own_objective(fitted.w[task].double(), classes, learner, pull).item() == pytest.approx(expected, rel=1e-5)
        assert float(fitted.objective[task]) == pytest.approx(expected, rel=1e-5)


def test_linear_fits_match_logistic_regression() -> None:
    fitted = fit_targets(FEATURES, OFFSETS, CLASSES, LINEAR, ce(tolerance=1e-6))
    for task, classes in enumerate(CLASSES):
        x, y = examples(classes)
        # scikit-learn minimises C times the sum of the losses plus 1/2 ||W||^2.
        model = LogisticRegression(C=1 / (LINEAR.l2 * len(y)), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
        expected = torch.from_numpy(model.coef_)
        assert float(fitted.objective[task]) == pytest.approx(own_objective(expected, classes, LINEAR, 0).item(), rel=1e-5)
        torch.testing.assert_close(fitted.w[task].double(), expected, rtol=0, atol=1e-3)
        assert float(fitted.accuracy[task]) == pytest.approx(model.score(x.numpy(), y.numpy()), abs=1.01 / len(y))


@pytest.mark.parametrize(("learner", "pull"), FITS, ids=NAMES)
def test_a_fit_does_not_depend_on_the_block(learner: Learner, pull: float) -> None:
    together = fitted_to_all(learner, pull)
    order = np.random.default_rng(0).permutation(TASKS)
    for tasks in (order[:1], order):
        other = fit_targets(FEATURES, OFFSETS, CLASSES[tasks], learner, ce(pull=pull))
        torch.testing.assert_close(other.w, together.w[tasks], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.accuracy, together.accuracy[tasks])
        np.testing.assert_allclose(other.iterations, together.iterations[tasks], atol=3)


def test_cosine_targets_are_as_long_as_the_class_means() -> None:
    fitted = fitted_to_all(PrototypeLearner("cosine"))
    means = class_means(FEATURES, OFFSETS)[CLASSES]
    torch.testing.assert_close(fitted.w.norm(dim=-1), means.norm(dim=-1), rtol=1e-5, atol=0)
    assert float((fitted.w - means).abs().max()) > 0.01


def test_a_pull_keeps_prototypes_near_the_class_means() -> None:
    means = class_means(FEATURES, OFFSETS)[CLASSES]
    far, near = (fitted_to_all(PrototypeLearner("euclidean"), pull).w - means for pull in (0.1, 10.0))
    assert float(near.norm()) < 0.2 * float(far.norm())


def test_fits_that_do_not_converge_are_recorded() -> None:
    fitted = fit_targets(FEATURES, OFFSETS, CLASSES, LINEAR, ce(max_iterations=3))
    assert fitted.iterations.tolist() == [3] * TASKS
    assert float(fitted.gradient_norm.min()) > 1e-5
    start = fit_targets(FEATURES, OFFSETS, CLASSES, LINEAR, ce(max_iterations=1))
    assert (fitted.objective < start.objective).all()


def test_not_finite_features_are_refused() -> None:
    features = FEATURES.clone()
    features[OFFSETS[3]] = torch.nan
    touched = [int(task) for task in np.flatnonzero((CLASSES == 3).any(1))]
    assert 0 < len(touched) < TASKS
    with pytest.raises(UserError, match=rf"^targets of tasks \[{100 + touched[0]}, .*\({len(touched)} in all\): the loss is not finite"):
        fit_targets(features, OFFSETS, CLASSES, LINEAR, ce(), first_task=100)
    with pytest.raises(UserError, match=r"^features of classes \[3\] \(1 in all\): not finite"):
        class_means(features, OFFSETS)


def test_linear_learners_need_a_fit_of_their_own() -> None:
    with pytest.raises(UserError, match=r"^targets\.kind=mean: .*targets\.kind=ce$"):
        fit_targets(FEATURES, OFFSETS, CLASSES, LINEAR, TargetsConfig())
    with pytest.raises(UserError, match=r"^targets\.pull=1\.0: .*$"):
        fit_targets(FEATURES, OFFSETS, CLASSES, LINEAR, ce(pull=1.0))


def test_the_scale_gives_linear_targets_the_standard_deviation() -> None:
    w = fitted_to_all(LINEAR).w.numpy()
    assert (target_scale(w, LINEAR, ce(std=0.2)) * w).std() == pytest.approx(0.2, rel=1e-4)
    assert target_scale(w, LINEAR, ce(std=None)) == 1.0
    assert target_scale(w, PrototypeLearner(), ce()) == 1.0


def write(folder: Path, learner: Learner, settings: TargetsConfig) -> Targets:
    folder.mkdir(exist_ok=True)
    write_targets(folder, FEATURES, OFFSETS, EpisodeSampler(OFFSETS, WAY, 1, 1, 0), learner, settings)
    names = [file.name for file in folder.iterdir()]
    return Targets.open(Artifact(folder, {"files": dict.fromkeys(names)}))


@pytest.mark.parametrize(("dtype", "rtol"), [("fp32", 1e-6), ("fp16", 1e-3)])
def test_fitted_targets_come_back_scaled(tmp_path: Path, dtype: str, rtol: float) -> None:
    there = write(tmp_path, LINEAR, ce(dtype=dtype))
    expected = fitted_to_all(LINEAR).w
    ids = np.array([10, 0, 7, 0])
    assert (there.num_tasks, there.dim) == (TASKS, DIM)
    assert there.w_0(ids).dtype == torch.float32
    torch.testing.assert_close(there.w_0(ids) / there.scale, expected[ids], rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(there.classes(ids), CLASSES[ids])
    assert there.w_0(np.arange(TASKS)).std().item() == pytest.approx(0.1, rel=0.01)


def test_means_are_stored_once_a_class(tmp_path: Path) -> None:
    there = write(tmp_path, PrototypeLearner(), TargetsConfig(num_tasks=TASKS))
    assert np.load(tmp_path / "targets.npy").shape == (len(SIZES), DIM)
    assert (there.num_tasks, there.dim, there.scale) == (TASKS, DIM, 1.0)
    torch.testing.assert_close(there.w_0(np.arange(TASKS)), class_means(FEATURES, OFFSETS)[CLASSES], rtol=0, atol=1e-6)


def test_the_summary_and_diagnostics_tell_how_the_fits_went(tmp_path: Path) -> None:
    write(tmp_path / "ok", LINEAR, ce())
    write(tmp_path / "cut", LINEAR, ce(max_iterations=2))
    ok, cut = (json.loads((tmp_path / name / "targets.json").read_text()) for name in ("ok", "cut"))
    assert (ok["tasks"], ok["unconverged"], cut["unconverged"]) == (TASKS, 0, TASKS)
    assert ok["mean_objective"] < cut["mean_objective"]
    assert (np.load(tmp_path / "ok" / "diagnostics.npy")["gradient_norm"] <= 1e-5).all()


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole", LINEAR, ce())
    first_tasks: list[int] = []

    def killed_in_the_second_block(*args: object) -> object:
        first_tasks.append(args[-1])  # type: ignore[arg-type]
        if first_tasks == [0, 4]:
            raise KeyboardInterrupt
        return fit_targets(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(targets, "fit_targets", killed_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", LINEAR, ce())
    write(tmp_path / "cut", LINEAR, ce())
    assert first_tasks == [0, 4, 4, 8]
    files = {file.name for file in (tmp_path / "whole").iterdir()}
    assert files == {"classes.npy", "targets.npy", "diagnostics.npy", "targets.json"}
    for name in files:
        assert artifact.sha256(tmp_path / "cut" / name) == artifact.sha256(tmp_path / "whole" / name)
