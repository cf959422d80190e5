"""Calibration against numbers made by hand, against scikit-learn, and on forecasts whose calibration is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from torch import Tensor

from metadiff.calibration import (
    NUM_BINS,
    Forecasts,
    calibration_record,
    expected_calibration_error,
    forecast,
    forecasters,
    judge,
    probabilities,
    sampled,
)
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.episodes import EpisodeSampler
from metadiff.evaluation import EvaluateConfig, TaskBlock, draw_tasks, score, systems
from metadiff.learners import PrototypeLearner
from metadiff.samplers import SamplerConfig
from metadiff.schedule import Schedule, ScheduleConfig
from metadiff.targets import class_means

CLASSES, IMAGES, DIM, WAY = 12, 30, 16, 5
OFFSETS = np.arange(CLASSES + 1) * IMAGES
SCHEDULE = Schedule(ScheduleConfig(num_steps=30))
LEARNER = PrototypeLearner()
DENOISER = build_denoiser(DenoiserConfig(), DIM, LEARNER, SCHEDULE)


@pytest.fixture(scope="module")
def block() -> TaskBlock:
    """Twenty tasks of overlapping classes."""
    generator = torch.Generator().manual_seed(3)
    centres = 0.1 * torch.randn(CLASSES, DIM, generator=generator)
    features = centres.repeat_interleave(IMAGES, 0) + 0.1 * torch.randn(CLASSES * IMAGES, DIM, generator=generator)
    return draw_tasks(EpisodeSampler(OFFSETS, WAY, 1, 6, 0), features, class_means(features, OFFSETS), np.arange(20), 7)


def made_up(tasks: int, queries: int, seed: int, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Probabilities (tasks, queries, 5) and the true ways, all tasks alike, drawn from them; `sharpness` then falsifies what is told."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(1, queries, WAY, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits[0].softmax(-1), 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(-1).expand(tasks, -1, -1), labels


def total_error(forecasts: Forecasts) -> float:
    return float(expected_calibration_error(forecasts.bins.sum(0)))


def test_numbers_made_by_hand() -> None:
    """Two tasks of two queries: confidences 0.9 (right), 0.6 (wrong) and 0.62 (right), 0.9 (right)."""
    p = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.62, 0.38], [0.1, 0.9]]], dtype=torch.float64)
    found = judge(p, torch.tensor([0, 1]))
    assert found.accuracy.tolist() == [0.5, 1.0]
    assert found.brier == pytest.approx([(2 * 0.1**2 + 2 * 0.6**2) / 2, (2 * 0.38**2 + 2 * 0.1**2) / 2])
    summed = found.bins.sum(0)
    # 0.6 lies on the edge 9/15, and in the bin below it; 0.62 lies above.
    assert {b: summed[b].tolist() for b in np.flatnonzero(summed[:, 0])} == {
        8: pytest.approx([1, 0.6, 0]),
        9: pytest.approx([1, 0.62, 1]),
        13: pytest.approx([2, 1.8, 2]),
    }
    assert total_error(found) == pytest.approx(1 / 4 * 0.6 + 1 / 4 * 0.38 + 2 / 4 * 0.1)


def test_confidences_at_the_ends_of_the_scale_are_counted() -> None:
    p = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]]], dtype=torch.float64)
    found = judge(p, torch.tensor([0, 0, 0]))
    assert found.bins[0, NUM_BINS - 1].tolist() == [1, 1, 1]
    assert found.bins[0, 0].tolist() == [1, 0, 0], "without any probability it is wrong, and said so without confidence"
    assert found.bins[0, :, 0].sum() == 3


def test_bins_are_those_of_scikit_learn() -> None:
    p, labels = made_up(1, 20_000, 0)
    summed = judge(p, labels).bins.sum(0)
    confidence, right = p[0].max(-1).values.numpy(), (p[0].argmax(-1) == labels).numpy()
    fraction, mean = calibration_curve(right, confidence, n_bins=NUM_BINS)
    filled = summed[summed[:, 0] > 0]
    assert filled[:, 2] / filled[:, 0] == pytest.approx(fraction, abs=1e-12)
    assert filled[:, 1] / filled[:, 0] == pytest.approx(mean, abs=1e-12)
    assert float(expected_calibration_error(summed)) == pytest.approx(np.abs(fraction - mean) @ filled[:, 0] / 20_000, abs=1e-12)


def test_forecasts_that_tell_the_truth_have_no_error_and_boasts_have_one() -> None:
    """Labels drawn from the very probabilities: what is left is the bins' noise, about sqrt(15 / n) / 2."""
    assert total_error(judge(*made_up(1, 100_000, 1))) < 0.006
    p, labels = made_up(1, 100_000, 1, sharpness=3.0)
    boast = judge(p, labels)
    assert total_error(boast) == pytest.approx(float(p.max(-1).values.mean()) - boast.accuracy[0], abs=1e-3)
    assert total_error(boast) > 0.1


def test_brier_prefers_the_truth_either_side() -> None:
    scores = [judge(*made_up(1, 100_000, 2, sharpness)).brier[0] for sharpness in (0.5, 1.0, 2.0)]
    assert scores[1] < scores[0]
    assert scores[1] < scores[2]


def test_probabilities_of_diverged_weights_are_zero(block: TaskBlock) -> None:
    w = block.w_T.clone()
    w[3, 2] = torch.inf
    p = probabilities(PrototypeLearner("dot"), w, block.query)
    assert (p[3] == 0).all()
    assert p[0].sum(-1).allclose(torch.ones(30, dtype=torch.float64))
    judged = judge(p, block.labels)
    assert judged.accuracy[3] == 0
    assert judged.brier[3] == 1


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_one_weight_and_class_means_predict_as_the_rows_do(scale: float, block: TaskBlock) -> None:
    """Euclidean logits, which depend on the weights' size."""
    learner = PrototypeLearner("euclidean")
    denoiser = build_denoiser(DenoiserConfig(), DIM, learner, SCHEDULE, scale)
    compared = forecast(forecasters(denoiser, learner, SCHEDULE, SamplerConfig(), 2), block)
    rows = score(systems(denoiser, denoiser, learner, SCHEDULE, SamplerConfig(), EvaluateConfig(gda_steps=1)), block).accuracy
    assert list(compared) == ["ensemble", "single", "class_mean"]
    assert np.array_equal(compared["single"].accuracy, rows["metadiff"])
    assert np.array_equal(compared["class_mean"].accuracy, rows["class_mean"])


def test_the_ensemble_is_the_mean_of_members_that_differ(block: TaskBlock) -> None:
    one, two = (forecasters(DENOISER, LEARNER, SCHEDULE, SamplerConfig(), members)["ensemble"](block) for members in (1, 2))
    second = 2 * two - one
    assert second.min() >= -1e-12, "the other member's own probabilities"
    assert (second.sum(-1) - 1).abs().max() < 1e-12
    assert (second - one).abs().mean() > 0.01, "another w_T and other noise"
    again = forecasters(DENOISER, LEARNER, SCHEDULE, SamplerConfig(), 2)["ensemble"](block)
    assert torch.equal(two, again)


def test_the_noise_is_kept_in_the_ensemble_alone(block: TaskBlock) -> None:
    assert sampled(SamplerConfig(steps=7)) == SamplerConfig(steps=7, stochastic=True)
    given = replace(SamplerConfig(), stochastic=True)
    noisy, plain = (forecasters(DENOISER, LEARNER, SCHEDULE, each, 1)["single"](block) for each in (given, SamplerConfig()))
    assert torch.equal(noisy, plain)


def test_the_record_compares_on_the_same_tasks() -> None:
    (p, labels), (boast, _) = made_up(30, 50, 4), made_up(30, 50, 4, sharpness=3.0)
    shifted = torch.stack([p[0].roll(i, 0) for i in range(30)])
    parts = {"ensemble": judge(p, labels), "single": judge(boast, labels), "class_mean": judge(shifted, labels)}
    record = calibration_record(parts, 10, SamplerConfig(steps=20), 1000)
    assert (record["members"], record["tasks"], record["queries"], record["evaluations"]) == (10, 30, 1500, 20)
    assert record["sampler"]["stochastic"] is True
    rows = {row["system"]: row for row in record["rows"]}
    ours, one, means = rows["ensemble"], rows["single"], rows["class_mean"]
    assert ours["accuracy"] == pytest.approx(parts["ensemble"].accuracy.mean())
    assert ours["ece_minus_single"] == pytest.approx(ours["ece"] - one["ece"])
    assert ours["brier_minus_class_mean"] == pytest.approx(ours["brier"] - means["brier"])
    assert ours["accuracy_minus_single_ci95"] == 0, "the same answers: no doubt about the difference"
    assert means["accuracy_minus_single_ci95"] > 0
    assert ours["ece_ci95"] == pytest.approx(0, abs=1e-12), "all tasks alike: drawing them anew changes nothing"
    assert means["ece_ci95"] > 0
    assert ours["ece_minus_class_mean_ci95"] > 0
    assert sum(b["queries"] for b in ours["bins"]) == 1500
    assert [b["accuracy"] is None for b in ours["bins"]] == [b["queries"] == 0 for b in ours["bins"]]


def test_a_system_differs_from_itself_by_nothing_for_certain() -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    scattered = judge(torch.cat([made_up(1, 50, seed)[0] for seed in range(9)]), labels)
    record = calibration_record(dict.fromkeys(("ensemble", "single", "class_mean"), scattered), 2, SamplerConfig(), 10)
    for row in record["rows"]:
        assert {value for name, value in row.items() if "_minus_" in name} == {0.0}


def test_the_interval_of_the_error_covers_its_scatter() -> None:
    """The half-width said of one set of tasks against the scatter over many sets, which it estimates."""
    labels = torch.zeros(40, dtype=torch.int64)
    p = torch.zeros(60 * 100, 40, 2, dtype=torch.float64)
    p[..., 0] = 0.3 + 0.7 * torch.rand(6000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p[..., 1] = 1 - p[..., 0]
    judged = judge(p, labels)
    errors = expected_calibration_error(judged.bins.reshape(60, 100, NUM_BINS, 3).sum(1))
    first = Forecasts(judged.accuracy[:100], judged.brier[:100], judged.bins[:100])
    [row] = [row for row in calibration_record(dict.fromkeys(("ensemble", "single", "class_mean"), first), 1, SamplerConfig(), 10)["rows"]][
        :1
    ]
    assert row["ece_ci95"] == pytest.approx(1.96 * errors.std(ddof=1), rel=0.35)


def test_parts_of_the_tasks_join_to_the_whole(block: TaskBlock) -> None:
    p = probabilities(LEARNER, block.w_T, block.query)
    whole, joined = judge(p, block.labels), Forecasts.joined([judge(p[:7], block.labels), judge(p[7:], block.labels)])
    for name in ("accuracy", "brier", "bins"):
        assert np.array_equal(getattr(whole, name), getattr(joined, name))
