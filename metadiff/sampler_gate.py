"""The gate in front of few-step samplers: none is used unless it is shown to lose nothing beside all steps of Eq. 8.

What is lost when steps are left out depends on the solver, the form of the denoiser and its training. So every candidate classifies the
same tasks of validation classes from the same w_T as the full sampler, and passes only if its paired interval rules out a loss of `MARGIN`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metadiff.config import dump
from metadiff.evaluation import interval
from metadiff.samplers import SamplerConfig

MARGIN = 0.002
"""The loss of accuracy that must be ruled out: 0.2 points."""


def _few(steps: int) -> tuple[SamplerConfig, ...]:
    return (
        SamplerConfig(steps=steps),
        SamplerConfig(method="eq8_2m", steps=steps, spacing="log_snr"),
        SamplerConfig(method="ddim", steps=steps),
        SamplerConfig(method="dpmpp2m", steps=steps),
    )


CANDIDATES = (
    *(SamplerConfig(steps=steps) for steps in (1, 2)),
    *(candidate for steps in (5, 10, 20) for candidate in _few(steps)),
    *_few(50)[:2],
)
"""In the order of their cost; of those that cost the same, the paper's solver first."""


def candidates(num_steps: int, given: SamplerConfig | None = None) -> tuple[SamplerConfig, ...]:
    """The candidates with fewer than the schedule's `num_steps` steps, computed with the precision and in the chunks of `given`."""
    given = given or SamplerConfig()
    fewer = [each for each in CANDIDATES if each.evaluations(num_steps) < num_steps]
    return tuple(replace(each, precision=given.precision, chunk=given.chunk) for each in fewer)


def reference(given: SamplerConfig | None = None) -> SamplerConfig:
    """What candidates are held against, and what is used where none passes: all steps of Eq. 8 in float32, in the chunks of `given`."""
    return SamplerConfig(chunk=(given or SamplerConfig()).chunk)


@dataclass(frozen=True)
class Choice:
    """What came of the gate.

    Attributes:
        sampler: what to use: the cheapest candidate that passed, or else the reference.
        gated: whether a candidate passed.
        num_steps: of the schedule.
        tasks: how many tasks decided.
        reference_accuracy: of the reference on them, 0 .. 1.
        trace: for each candidate its method, steps, spacing, network evaluations, accuracy, `difference` to the reference, `ci95` (half
            the width of its paired 95 % interval) and whether it `passed`.
    """

    sampler: SamplerConfig
    gated: bool
    num_steps: int
    tasks: int
    reference_accuracy: float
    trace: tuple[dict[str, Any], ...]

    def record(self) -> dict[str, Any]:
        """All of it in JSON values; `validate(SamplerConfig, record["taken"], ...)` is the sampler again."""
        return {
            "taken": dump(self.sampler),
            "gated": self.gated,
            "evaluations": self.sampler.evaluations(self.num_steps),
            "tasks": self.tasks,
            "margin": MARGIN,
            "reference_accuracy": self.reference_accuracy,
            "trace": list(self.trace),
        }

    def __str__(self) -> str:
        """One line for the log."""
        taken = f"{self.sampler.method} with {self.sampler.evaluations(self.num_steps)} of {self.num_steps} steps"
        passed = f"{sum(row['passed'] for row in self.trace)} of {len(self.trace)}"
        return f"{taken}; {passed} candidates lose less than {MARGIN * 100:.1f} points, by {self.tasks} validation tasks"


def choose(
    among: Sequence[SamplerConfig], reference_scores: np.ndarray, scores: Mapping[int, np.ndarray] | Sequence[np.ndarray], num_steps: int
) -> Choice:
    """Take the cheapest candidate whose paired 95 % interval of (candidate - reference) lies above -`MARGIN`.

    Each candidate may pass wrongly once in 40 times where its true loss is just the margin, and there are several: the interval is each
    candidate's own, and is not widened for their number.

    Args:
        among: `candidates(num_steps)`.
        reference_scores: (tasks,) accuracy of `reference()` on each task, 0 .. 1; at least two tasks.
        scores: the same of `among[i]` under i, on the same tasks from the same w_T.
        num_steps: of the schedule.
    """
    trace = tuple(_compared(each, reference_scores, scores[i], num_steps) for i, each in enumerate(among))
    passed = [(row["evaluations"], i) for i, row in enumerate(trace) if row["passed"]]
    sampler = among[min(passed)[1]] if passed else reference(among[0] if among else None)
    return Choice(sampler, bool(passed), num_steps, len(reference_scores), float(reference_scores.mean()), trace)


def _compared(candidate: SamplerConfig, reference_scores: np.ndarray, scores: np.ndarray, num_steps: int) -> dict[str, Any]:
    assert scores.shape == reference_scores.shape, "the same tasks"
    differences = scores - reference_scores
    difference, ci95 = float(differences.mean()), interval(differences)
    return {
        "method": candidate.method,
        "steps": candidate.steps,
        "spacing": candidate.spacing,
        "evaluations": candidate.evaluations(num_steps),
        "accuracy": float(scores.mean()),
        "difference": difference,
        "ci95": ci95,
        "passed": difference - ci95 > -MARGIN,
    }
