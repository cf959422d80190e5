"""Uncertainty: what sampling many weights for a task, rather than one, does to predicted probabilities.

MetaDiff (AAAI 2024) calls sigma_t z, Term 3 of Eq. 7, its uncertainty term and drops it at test time. Here it is kept: M weights are
sampled for a task, each from a w_T of its own, and the probabilities that they predict are averaged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metadiff.config import dump
from metadiff.denoiser import Denoiser
from metadiff.errors import UserError
from metadiff.evaluation import TaskBlock, interval
from metadiff.learners import Learner, PrototypeLearner
from metadiff.samplers import SamplerConfig, sample
from metadiff.schedule import Schedule

NUM_BINS = 15
_RESAMPLINGS, _AT_ONCE = 1000, 50

Forecaster = Callable[[TaskBlock], Tensor]
"""Maps tasks to the probabilities (B, N Q, N) of their queries' ways."""


@dataclass(frozen=True)
class Forecasts:
    """How predicted probabilities did on some tasks.

    Attributes:
        accuracy: (tasks,) of the most probable way.
        brier: (tasks,) mean over the queries of sum_k (p_k - y_k)^2; 0 is best, 2 worst.
        bins: (tasks, NUM_BINS, 3) float64: how many queries have their highest probability in each of the equally wide bins
            (b / NUM_BINS, (b + 1) / NUM_BINS], the sum of those probabilities, and how many of these queries are right.
    """

    accuracy: np.ndarray
    brier: np.ndarray
    bins: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Forecasts"]) -> "Forecasts":
        """Those of all tasks of the parts, in their order."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("accuracy", "brier", "bins")))


def sampled(sampler: SamplerConfig) -> SamplerConfig:
    """The same sampler with the noise kept.

    Raises:
        UserError: it draws none.
    """
    if sampler.method == "dpmpp2m":
        raise UserError(
            "evaluate.ensemble: sampler.method='dpmpp2m' draws no noise, so all its weights would be alike; set sampler.method to eq8, "
            "eq8_2m or ddim, or evaluate.ensemble=0"
        )
    return replace(sampler, stochastic=True)


def forecasters(
    denoiser: Denoiser, learner: Learner, schedule: Schedule, sampler: SamplerConfig, num_members: int
) -> dict[str, Forecaster]:
    """The systems to compare: `ensemble` averages `num_members` sampled weights, `single` takes the one that is sampled without noise."""
    cosine, single = PrototypeLearner("cosine"), replace(sampler, stochastic=False)

    def weights(task: TaskBlock, w_T: Tensor, config: SamplerConfig, generator: torch.Generator | None = None) -> Tensor:
        return sample(denoiser, schedule, task.support, w_T, config, generator) / denoiser.target_scale

    def ensemble(task: TaskBlock) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=task.w_T.device)
        for member in range(num_members):
            generator = _generator(task, member)
            w_T = torch.randn(task.w_T.shape, generator=generator, device=task.w_T.device)
            total = total + probabilities(learner, weights(task, w_T, sampled(sampler), generator), task.query)
        return total / num_members

    return {
        "ensemble": ensemble,
        "single": lambda task: probabilities(learner, weights(task, task.w_T, single), task.query),
        "class_mean": lambda task: probabilities(cosine, task.support.means, task.query),
    }


def _generator(task: TaskBlock, member: int) -> torch.Generator:
    seed = int(np.random.SeedSequence([task.seed, member]).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(task.w_T.device).manual_seed(seed)


def probabilities(learner: Learner, w: Tensor, query: Tensor) -> Tensor:
    """(B, N Q, N) float64: the softmax of the logits (Eq. 9); zeros where diverged weights give no finite logits."""
    logits = learner.logits(w, query).double()
    return torch.where(logits.isfinite().all(-1, keepdim=True), logits.softmax(-1), 0.0)


@torch.inference_mode()
def forecast(systems: Mapping[str, Forecaster], task: TaskBlock) -> dict[str, Forecasts]:
    """How every system does on one block of tasks."""
    return {name: judge(system(task), task.labels) for name, system in systems.items()}


def judge(p: Tensor, labels: Tensor) -> Forecasts:
    """Hold probabilities (B, N Q, N) against the true ways (N Q,). A query without any probability is wrong, in the lowest bin."""
    confidence, predicted = p.max(-1)
    right = (predicted == labels) & (confidence > 0)
    # As in Guo et al., a bin has its upper edge, and not its lower one.
    edges = torch.linspace(0, 1, NUM_BINS + 1, dtype=p.dtype, device=p.device)[1:-1]
    member = F.one_hot(torch.bucketize(confidence, edges), NUM_BINS).to(p)
    bins = torch.stack([torch.ones_like(confidence), confidence, right.to(p)], dim=-1)
    brier = (p - F.one_hot(labels, p.shape[-1])).square().sum(-1).mean(1)
    return Forecasts(right.double().mean(1).cpu().numpy(), brier.cpu().numpy(), (member.mT @ bins).cpu().numpy())


def expected_calibration_error(bins: np.ndarray) -> np.ndarray:
    """(...,): sum_b n_b / n |accuracy_b - confidence_b|, for `bins` (..., NUM_BINS, 3) as in `Forecasts`, summed over tasks.

    "On Calibration of Modern Neural Networks" (Guo et al., ICML 2017), Eq. 3: of the most probable class, in 15 equally wide bins.
    """
    number, confidence, right = np.moveaxis(bins, -1, 0)
    return np.abs(right - confidence).sum(-1) / number.sum(-1)


def calibration_record(forecasts: Mapping[str, Forecasts], members: int, sampler: SamplerConfig, num_steps: int) -> dict[str, Any]:
    """What is known of all tasks' forecasts, in JSON values: how they were made, and a row a system."""
    errors = {name: _resampled_errors(each.bins) for name, each in forecasts.items()}
    first = next(iter(forecasts.values()))
    return {
        "members": members,
        "sampler": dump(sampled(sampler)),
        "evaluations": sampler.evaluations(num_steps),
        "tasks": len(first.accuracy),
        "queries": int(first.bins[..., 0].sum()),
        "interval": f"95 %, 1.96 s / sqrt(tasks); of ece 1.96 s over {_RESAMPLINGS} resamplings of the tasks; differences are paired",
        "rows": [_row(name, forecasts, errors) for name in forecasts],
    }


def _row(name: str, forecasts: Mapping[str, Forecasts], errors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    own = forecasts[name]
    row: dict[str, Any] = {"system": name}
    row |= _measures(own.accuracy, own.brier, own.bins, errors[name], 0.0, "")
    for other in [other for other in ("single", "class_mean") if other != name]:
        theirs = forecasts[other]
        accuracy, brier = own.accuracy - theirs.accuracy, own.brier - theirs.brier
        below = float(expected_calibration_error(theirs.bins.sum(0)))
        row |= _measures(accuracy, brier, own.bins, errors[name] - errors[other], below, f"_minus_{other}")
    return row | {"bins": _bins(own.bins.sum(0))}


def _measures(accuracy: np.ndarray, brier: np.ndarray, bins: np.ndarray, errors: np.ndarray, below: float, suffix: str) -> dict[str, float]:
    """The three measures with half the widths of their intervals; `below` is taken off the error of `bins`."""
    return {
        f"accuracy{suffix}": float(accuracy.mean()),
        f"accuracy{suffix}_ci95": interval(accuracy),
        f"ece{suffix}": float(expected_calibration_error(bins.sum(0))) - below,
        f"ece{suffix}_ci95": float(1.96 * errors.std(ddof=1)),
        f"brier{suffix}": float(brier.mean()),
        f"brier{suffix}_ci95": interval(brier),
    }


def _resampled_errors(bins: np.ndarray) -> np.ndarray:
    """(_RESAMPLINGS,): the calibration error of tasks drawn anew with replacement; the same draws for every system."""
    tasks, flat = len(bins), bins.reshape(len(bins), -1)
    draw, errors = np.random.default_rng(0), []
    for _ in range(0, _RESAMPLINGS, _AT_ONCE):
        often = draw.multinomial(tasks, np.full(tasks, 1 / tasks), _AT_ONCE)
        errors.append(expected_calibration_error((often @ flat).reshape(_AT_ONCE, *bins.shape[1:])))
    return np.concatenate(errors)


def _bins(summed: np.ndarray) -> list[dict[str, Any]]:
    """Each bin's number of queries, and the mean confidence and accuracy of those, None where there are none."""
    return [
        {"queries": int(number), "confidence": confidence / number if number else None, "accuracy": right / number if number else None}
        for number, confidence, right in summed.tolist()
    ]
