"""Evaluation: the rows, their intervals, and what they are worth on tasks whose answer is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.episodes import EpisodeSampler
from metadiff.evaluation import (
    EvaluateConfig,
    Scores,
    TaskBlock,
    blocks,
    draw_tasks,
    gradient_descent,
    interval,
    predictions,
    result_rows,
    score,
    start_noise,
    systems,
    trace,
)
from metadiff.learners import PrototypeLearner, Support
from metadiff.samplers import SamplerConfig
from metadiff.schedule import Schedule, ScheduleConfig
from metadiff.targets import class_means

CLASSES, IMAGES, DIM = 12, 30, 16
OFFSETS = np.arange(CLASSES + 1) * IMAGES


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Twelve overlapping classes of small features."""
    generator = torch.Generator().manual_seed(3)
    centres = 0.1 * torch.randn(CLASSES, DIM, generator=generator)
    return (centres.repeat_interleave(IMAGES, 0) + 0.1 * torch.randn(CLASSES * IMAGES, DIM, generator=generator)).float()


def tasks(features: Tensor, ids: np.ndarray, shot: int = 2) -> TaskBlock:
    sampler = EpisodeSampler(OFFSETS, 5, shot, 6, 0)
    return draw_tasks(sampler, features, class_means(features, OFFSETS), ids, 7)


def test_tasks_hold_what_they_say(features: Tensor) -> None:
    block = tasks(features, np.arange(4))
    assert block.support.features.shape == (4, 10, DIM)
    assert block.query.shape == (4, 30, DIM)
    assert block.labels.tolist() == [way for way in range(5) for _ in range(6)]
    assert block.w_T.shape == block.full_means.shape == (4, 5, DIM)
    rows = {tuple(row) for row in block.support.features[0].tolist()}
    assert not rows & {tuple(row) for row in block.query[0].tolist()}, "queries are no support images"


def test_tasks_do_not_depend_on_their_block(features: Tensor) -> None:
    together, alone = tasks(features, np.arange(6)), tasks(features, np.array([4]))
    assert torch.equal(together.w_T[4], alone.w_T[0])
    assert torch.equal(together.query[4], alone.query[0])
    assert torch.equal(together.support.features[4], alone.support.features[0])


def test_start_noise_is_standard_normal() -> None:
    noise = start_noise(np.arange(200), 5, 64, 0)
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert not torch.equal(noise, start_noise(np.arange(200), 5, 64, 1))


def test_interval_and_pairing() -> None:
    accuracy = {"metadiff": np.array([0.9, 0.7, 0.8, 0.6]), "class_mean": np.array([0.8, 0.6, 0.7, 0.5]), "identity": np.full(4, 0.75)}
    assert interval(accuracy["metadiff"]) == pytest.approx(1.96 * np.std([0.9, 0.7, 0.8, 0.6], ddof=1) / 2)
    ours, means, _ = result_rows(Scores(accuracy, dict.fromkeys(accuracy, 1.0)), {"preset": "stable", "way": 5, "shot": 1})
    assert ours["minus_class_mean"] == pytest.approx(0.1)
    assert ours["minus_class_mean_ci95"] == pytest.approx(0, abs=1e-12), "a constant difference is certain, however the tasks scatter"
    assert means["minus_class_mean"] == means["minus_class_mean_ci95"] == 0
    keys = {"system", "preset", "way", "shot", "tasks", "accuracy", "ci95", "minus_class_mean", "minus_class_mean_ci95", "seconds"}
    assert keys <= ours.keys()


def test_rows_stand_where_they_must(features: Tensor) -> None:
    schedule = Schedule(ScheduleConfig(num_steps=100))
    learner = PrototypeLearner()
    denoiser = build_denoiser(DenoiserConfig(preset="consistent"), DIM, learner, schedule)
    compared = systems(denoiser, denoiser, learner, schedule, SamplerConfig(), EvaluateConfig(gda_steps=50))
    scores = Scores.joined([score(compared, tasks(features, np.array(block))) for block in blocks(300)])
    accuracy, seconds = scores.accuracy, scores.seconds
    assert list(accuracy) == ["metadiff", "class_mean", "gda", "identity", "untrained", "oracle"] == list(seconds)
    assert all(values.shape == (300,) for values in accuracy.values())
    assert np.array_equal(accuracy["metadiff"], accuracy["class_mean"]), "an untrained `consistent` denoiser is the class means"
    assert np.array_equal(accuracy["identity"], accuracy["class_mean"])
    means = {name: values.mean() for name, values in accuracy.items()}
    assert 0.2 < means["gda"] < means["oracle"]
    assert means["class_mean"] < means["oracle"]


def test_gradient_descent_fits_the_support(features: Tensor) -> None:
    block = tasks(features, np.arange(3), shot=1)
    learner = PrototypeLearner()
    w = gradient_descent(learner, block.support, block.w_T, 1.0, 200)
    before, after = (learner.ce_loss(x, block.support) for x in (block.w_T, w))
    assert (after < before).all()
    assert (learner.logits(w, block.support.features).argmax(-1) == block.support.labels).all()


def test_diverged_weights_are_never_right(features: Tensor) -> None:
    block = tasks(features, np.arange(2))
    for value in (math.nan, math.inf):
        assert (predictions(PrototypeLearner("dot"), torch.full_like(block.w_T, value), block) == -1).all()


def test_trace_ends_at_the_weights_that_are_scored(features: Tensor) -> None:
    schedule, learner = Schedule(ScheduleConfig(num_steps=100)), PrototypeLearner()
    denoiser = build_denoiser(DenoiserConfig(), DIM, learner, schedule)
    block = tasks(features, np.arange(20))
    curves = trace(denoiser, learner, schedule, SamplerConfig(), block)
    assert curves["t"][0] == 100
    assert curves["t"][-1] == 0
    assert curves["t"] == sorted(curves["t"], reverse=True)
    compared = systems(denoiser, denoiser, learner, schedule, SamplerConfig(), EvaluateConfig())
    scored = score(compared, block).accuracy
    assert curves["accuracy"][-1] == pytest.approx(scored["metadiff"].mean(), abs=1e-9)
    assert curves["class_mean_accuracy"] == pytest.approx(scored["class_mean"].mean(), abs=1e-9)
    assert curves["loss"][-1] < curves["loss"][0]


@pytest.mark.parametrize(("steps", "points"), [(1, 2), (30, 31), (200, 51)])
def test_trace_of_few_steps_keeps_them_from_first_to_last(features: Tensor, steps: int, points: int) -> None:
    schedule, learner = Schedule(), PrototypeLearner()
    denoiser = build_denoiser(DenoiserConfig(body="none"), DIM, learner, schedule)
    curves = trace(denoiser, learner, schedule, SamplerConfig(method="ddim", steps=steps), tasks(features, np.arange(5)))
    assert (curves["t"][0], curves["t"][-1]) == (1000, 0)
    assert len(curves["t"]) == len(curves["accuracy"]) == points


def test_unequal_shots_within_an_episode() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 2]])
    support = Support.of(torch.randn(2, 6, DIM, generator=generator), labels, 3)
    learner = PrototypeLearner()
    w = gradient_descent(learner, support, torch.randn(2, 3, DIM, generator=generator), 1.0, 200)
    assert (learner.logits(w, support.features).argmax(-1) == labels).all()
