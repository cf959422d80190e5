"""The gate's decision on made-up accuracies, and on a real denoiser."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metadiff.config import validate
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.episodes import EpisodeSampler
from metadiff.evaluation import draw_tasks, interval, predictions
from metadiff.learners import PrototypeLearner
from metadiff.sampler_gate import CANDIDATES, MARGIN, candidates, choose, reference
from metadiff.samplers import SamplerConfig, sample
from metadiff.schedule import Schedule

TASKS = 400
AMONG = candidates(1000)
FULL = np.random.default_rng(0).uniform(0.4, 1.0, TASKS)


def losing(points: float, half_width: float) -> np.ndarray:
    """Accuracies whose paired difference to the reference has this mean and this half width of its interval, in points, exactly."""
    scatter = np.tile([1.0, -1.0], TASKS // 2)
    return FULL - points / 100 + scatter * (half_width / 100 / interval(scatter))


def scores(**passing: tuple[float, float]) -> dict[int, np.ndarray]:
    """All candidates lose two points, but those given by their place."""
    return {i: losing(*passing.get(f"at{i}", (2.0, 0.1))) for i in range(len(AMONG))}


def test_candidates_are_in_the_order_of_their_cost_and_all_different() -> None:
    costs = [each.evaluations(1000) for each in CANDIDATES]
    assert costs == sorted(costs)
    assert len({*CANDIDATES}) == len(CANDIDATES)
    assert {each.method for each in CANDIDATES} == {"eq8", "eq8_2m", "ddim", "dpmpp2m"}
    assert not any(each.stochastic or each.eq8_as_printed for each in CANDIDATES)
    assert sum(costs) < 500, "together cheap beside the 1000 steps of the reference"


def test_only_fewer_steps_than_the_schedule_has_are_tried() -> None:
    assert [each.steps for each in candidates(10)] == [1, 2, 5, 5, 5, 5]
    assert candidates(1) == ()
    choice = choose((), FULL, {}, 1)
    assert (choice.sampler, choice.gated) == (SamplerConfig(), False)


def test_precision_and_chunks_are_the_given_ones_and_the_reference_is_exact() -> None:
    given = SamplerConfig(precision="bf16", chunk=7)
    assert {(each.precision, each.chunk) for each in candidates(1000, given)} == {("bf16", 7)}
    assert reference(given) == SamplerConfig(chunk=7)
    assert choose(candidates(1000, given), FULL, scores(), 1000).sampler == reference(given)


@pytest.mark.parametrize(
    ("points", "half_width", "passed"),
    [(0.0, 0.19, True), (0.0, 0.21, False), (0.15, 0.04, True), (0.15, 0.06, False), (-1.0, 1.1, True), (-1.0, 1.3, False)],
)
def test_the_whole_interval_must_lie_above_the_margin(points: float, half_width: float, passed: bool) -> None:
    choice = choose(AMONG, FULL, scores(at3=(points, half_width)), 1000)
    row = choice.trace[3]
    assert row["difference"] == pytest.approx(-points / 100)
    assert row["ci95"] == pytest.approx(half_width / 100)
    assert choice.gated == row["passed"] == passed == (row["difference"] - row["ci95"] > -MARGIN)
    assert choice.sampler == (AMONG[3] if passed else SamplerConfig())


def test_exactly_the_same_predictions_pass_and_exactly_the_margin_does_not() -> None:
    assert choose(AMONG[:1], FULL, [FULL], 1000).gated
    halves = np.full(TASKS, 0.5)
    assert not choose(AMONG[:1], halves, [halves - MARGIN], 1000).gated


def test_the_cheapest_that_passes_is_taken_whatever_the_order() -> None:
    passing = {f"at{i}": (0.0, 0.1) for i in (5, 9, len(AMONG) - 1)}
    assert choose(AMONG, FULL, scores(**passing), 1000).sampler == AMONG[5]
    backwards = choose(AMONG[::-1], FULL, [*scores(**passing).values()][::-1], 1000)
    assert backwards.sampler.steps == AMONG[5].steps


def test_a_better_but_dearer_one_is_not_preferred() -> None:
    assert choose(AMONG, FULL, scores(at2=(0.1, 0.05), at9=(-3.0, 0.1)), 1000).sampler == AMONG[2]


def test_pairing_is_what_decides() -> None:
    """The same accuracies on tasks in another order have the same mean, and no paired interval that could pass."""
    assert choose(AMONG[:1], FULL, [FULL], 1000).gated
    assert not choose(AMONG[:1], FULL, [FULL[::-1].copy()], 1000).gated


def test_scores_of_other_tasks_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="same tasks"):
        choose(AMONG[:1], FULL, [FULL[:-1]], 1000)


def test_the_record_is_json_and_gives_the_sampler_back() -> None:
    choice = choose(AMONG, FULL, scores(at4=(0.0, 0.1)), 1000)
    record = json.loads(json.dumps(choice.record()))
    assert validate(SamplerConfig, record["taken"], "results.json") == choice.sampler == AMONG[4]
    assert (record["gated"], record["tasks"], record["evaluations"]) == (True, TASKS, AMONG[4].steps)
    assert [row["passed"] for row in record["trace"]] == [i == 4 for i in range(len(AMONG))]
    assert record["reference_accuracy"] == pytest.approx(FULL.mean())
    assert str(choice) == (
        f"ddim with {AMONG[4].steps} of 1000 steps; 1 of {len(AMONG)} candidates lose less than 0.2 points, by {TASKS} validation tasks"
    )


def test_a_real_denoiser_passes_where_few_steps_lose_nothing_and_not_where_they_do() -> None:
    """With eps_hat = w - c, Eq. 8 ends on class means however many its steps; DDIM keeps the start's noise."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(8, 1, 32, generator=generator)
    features = 0.1 * (classes + 1.5 * torch.randn(8, 20, 32, generator=generator)).flatten(0, 1)
    sampler, learner, schedule = EpisodeSampler(np.arange(9) * 20, 5, 1, 10, 0), PrototypeLearner(), Schedule()
    task = draw_tasks(sampler, features, classes[:, 0], np.arange(150), 0)
    denoiser = build_denoiser(DenoiserConfig(body="none"), 32, learner, schedule)

    def accuracy(config: SamplerConfig) -> np.ndarray:
        w_0 = sample(denoiser, schedule, task.support, task.w_T, config)
        return (predictions(learner, w_0, task) == task.labels).double().mean(1).numpy()

    among = [SamplerConfig(method="ddim", steps=20), replace(reference(), steps=50)]
    choice = choose(among, accuracy(reference()), [accuracy(each) for each in among], 1000)
    assert choice.reference_accuracy > 0.5
    assert choice.trace[0]["difference"] < -0.02
    assert choice.sampler == among[1]
