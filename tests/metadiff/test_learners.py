import pytest
import torch
from torch import Tensor

from metadiff.errors import UserError
from metadiff.learners import Gain, Learner, LearnerConfig, LinearLearner, PrototypeLearner, Support, build_learner

LEARNERS: list[Learner] = [PrototypeLearner("cosine", 7.0), PrototypeLearner("euclidean"), PrototypeLearner("dot"), LinearLearner(l2=0.3)]


@pytest.fixture
def uneven() -> Support:
    """Two tasks, three classes with 1 to 4 shots, padding in front, within and behind."""
    labels = torch.tensor([[0, 1, 1, 2, 2, 2, -1], [-1, 2, 0, 0, -1, 0, 1]])
    return Support.of(_randn(2, 7, 5), labels, 3)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _autograd(loss: Tensor, w: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), w)[0]


def _naive_cross_entropy(learner: Learner, w: Tensor, support: Support) -> Tensor:
    """The mean over the examples that are not padding, one task and one example at a time."""
    losses = []
    for b in range(len(w)):
        terms = [
            -learner.logits(w[b : b + 1], x[None, None])[0, 0].log_softmax(0)[y]
            for x, y in zip(support.features[b], support.labels[b].tolist(), strict=True)
            if y >= 0
        ]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def test_support_counts_and_means_ignore_padding(uneven: Support) -> None:
    assert uneven.counts.tolist() == [[1, 2, 3], [3, 1, 1]]
    assert uneven.size.tolist() == [6, 5]
    torch.testing.assert_close(uneven.means[1, 0], uneven.features[1, [2, 3, 5]].mean(0))


@pytest.mark.parametrize("learner", LEARNERS)
def test_padding_contributes_nothing(learner: Learner, uneven: Support) -> None:
    garbage = uneven.features.masked_fill((uneven.labels < 0)[..., None], 9.0)
    padded, w = Support(garbage, uneven.labels, 3), _randn(2, 3, 5, seed=1)
    for method in (learner.anchor, lambda s: learner.ce_loss(w, s), lambda s: learner.ce_gradient(w, s)):
        torch.testing.assert_close(method(padded), method(uneven))
    nan = garbage.masked_fill((uneven.labels < 0)[..., None], torch.nan)
    torch.testing.assert_close(learner.ce_gradient(w, Support.of(nan, uneven.labels, 3)), learner.ce_gradient(w, uneven))


@pytest.mark.parametrize("learner", LEARNERS)
def test_cross_entropy_and_its_gradient_equal_autograd(learner: Learner, uneven: Support) -> None:
    w = _randn(2, 3, 5, seed=1).requires_grad_()
    naive = _naive_cross_entropy(learner, w, uneven)
    if isinstance(learner, LinearLearner):
        naive = naive + learner.l2 / 2 * (w**2).sum((1, 2))
    torch.testing.assert_close(learner.ce_loss(w, uneven), naive)
    torch.testing.assert_close(learner.ce_gradient(w, uneven), _autograd(naive, w))


def test_l2_gradient_equals_autograd_of_equation_11(uneven: Support) -> None:
    learner, w = PrototypeLearner(), _randn(2, 3, 5, seed=1).requires_grad_()
    own = [[(w[b, y] - uneven.features[b, i]).square().sum() for i, y in enumerate(uneven.labels[b].tolist()) if y >= 0] for b in range(2)]
    mean = torch.stack([torch.stack(terms).mean() for terms in own])
    torch.testing.assert_close(learner.l2_loss(w, uneven), mean)
    gradient = _autograd(mean, w)
    torch.testing.assert_close(learner.l2_gradient(w, uneven), gradient)
    torch.testing.assert_close(learner.l2_gradient(w, uneven, "sum"), gradient * uneven.size[:, None, None])


def test_gains_at_balanced_shots() -> None:
    way, shots = 4, 3
    support, w = Support.of(_randn(1, 12, 6), torch.arange(12)[None] % way, way), _randn(1, way, 6, seed=1)
    learner, step = PrototypeLearner(), w - support.means
    l2_factors: list[tuple[Gain, float]] = [("mean", 2 / way), ("sum", 2 * shots), ("one", 1.0), (0.7, 0.7)]
    ce_factors: list[tuple[Gain, float]] = [("mean", 1.0), ("sum", way * shots), ("one", way), (0.7, 0.7 * way)]
    for gain, factor in l2_factors:
        torch.testing.assert_close(learner.gradient(w, support, "l2", gain), factor * step)
    for gain, factor in ce_factors:
        torch.testing.assert_close(learner.gradient(w, support, "ce", gain), factor * learner.ce_gradient(w, support))


def test_gain_one_of_the_linear_learner_leaves_weights_as_they_are() -> None:
    """Far away from the data the cross-entropy is flat, so that what remains is the gradient of l2/2 ||W||^2."""
    learner, support = LinearLearner(l2=0.05), Support.of(_randn(1, 3, 8), torch.arange(3)[None], 3)
    w = support.means * 1e4
    assert torch.allclose(learner.gradient(w, support, "ce", "one"), w)


def test_logits() -> None:
    w, x = _randn(2, 3, 5), _randn(2, 4, 5, seed=1)
    distances = torch.cdist(x, w).square()
    torch.testing.assert_close(PrototypeLearner("euclidean").logits(w, x), -distances)
    cosine = torch.nn.functional.cosine_similarity(x[:, :, None], w[:, None], dim=-1)
    torch.testing.assert_close(PrototypeLearner().logits(w, x), 10 * cosine)
    torch.testing.assert_close(LinearLearner().logits(w, x), PrototypeLearner("dot").logits(w, x))


@pytest.mark.parametrize("feature_dim", [4, 40])
def test_ridge_fit_is_the_minimiser_on_either_side_of_the_dual(uneven: Support, feature_dim: int) -> None:
    x = _randn(2, 7, feature_dim, seed=2)
    support = Support.of(x, uneven.labels, 3)
    w = LinearLearner().ridge_fit(support, 0.5).requires_grad_()
    y = support.one_hot - 1 / 3
    errors = ((support.features @ w.mT - y) * (support.labels >= 0)[..., None]).square().sum() + 0.5 * w.square().sum()
    torch.testing.assert_close(_autograd(errors, w), torch.zeros_like(w), atol=1e-10, rtol=0)
    torch.testing.assert_close(w.sum(1), torch.zeros_like(w[:, 0]), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(2, 3, 4), torch.tensor([[0, 1, 2], [0, 1, 1]]), "class 2 of task 1 has no example"),
        (torch.zeros(1, 3, 4), torch.tensor([[0, 1, 3]]), "labels from 0 to 3"),
        (torch.zeros(1, 3, 4), torch.tensor([[0, -2, 1]]), "labels from -2"),
        (torch.zeros(1, 3, 4), torch.tensor([[0, 1]]), "expected .tasks, examples, D."),
    ],
)
def test_unusable_support_is_a_user_error(features: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Support.of(features, labels, 3)


def test_build_learner() -> None:
    assert build_learner(LearnerConfig(logits="dot")) == PrototypeLearner("dot", 10.0)
    assert build_learner(LearnerConfig(kind="linear", l2=0.1)) == LinearLearner(0.1, 1.0)
