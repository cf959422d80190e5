"""Evaluation: accuracy of every system on the same tasks, with 95 % intervals, paired against class means and identity."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metadiff.config import config
from metadiff.denoiser import Denoiser
from metadiff.episodes import Episodes, EpisodeSampler
from metadiff.learners import Learner, PrototypeLearner, Support
from metadiff.samplers import SamplerConfig, denoise_steps, sample
from metadiff.schedule import Schedule

TRACE_POINTS = 51
BLOCK = 256


@config
class EvaluateConfig:
    """The protocol of the rows; the paper's is 600 tasks with 15 queries a class (Section 5.2)."""

    split: Literal["novel", "val"] = "novel"
    """Rows on `val` are marked as tuned on: those classes chose the options."""
    num_tasks: Annotated[int, Field(ge=2)] = 600
    gda_learning_rate: Annotated[float, Field(gt=0)] = 300.0
    """Of the gradient-descent row: cross-entropy of the learner's logits on the support set, from w ~ N(0, I) (Eq. 4).

    The default is the best of 1, 3, 10 .. 3000 for cosine logits on the validation classes of glyphs; other logits want far less.
    """
    gda_steps: Annotated[int, Field(ge=1)] = 100
    trace_tasks: Annotated[int, Field(ge=1)] = 200
    """Tasks behind the curves along the denoising steps (Figure 5)."""
    sampler: Literal["given", "auto"] = "given"
    """`given`: the section `sampler`. `auto`: for each number of shots, what passes the gate of `sampler_gate` on validation classes."""
    gate_tasks: Annotated[int, Field(ge=2)] = 2000
    """Validation tasks behind that choice."""
    ensemble: Annotated[int, Field(ge=0)] = 0
    """Weights sampled for each task, with sigma_t z, whose predicted probabilities are averaged (Term 3); 0 leaves that out.

    They cost as many times one: by all steps of Eq. 8, or by the section `sampler` where that is given.
    """
    ensemble_tasks: Annotated[int, Field(ge=2)] = 200
    """Tasks behind the ensemble's accuracy and calibration, the first ones of the rows'."""


@dataclass(frozen=True)
class TaskBlock:
    """B tasks of one shot, on transformed features.

    Attributes:
        support: of the B tasks.
        query: (B, N Q, D), class by class.
        labels: (N Q,) the true way of each query.
        w_T: (B, N, D) the Gaussian start, drawn from each task's number alone.
        full_means: (B, N, D) means of all images of each class, for the oracle.
        seed: what z of a stochastic sampler is drawn from.
    """

    support: Support
    query: Tensor
    labels: Tensor
    w_T: Tensor
    full_means: Tensor
    seed: int


System = Callable[[TaskBlock], tuple[Learner, Tensor]]
"""Maps tasks to the learner and the weights (B, N, D) that classify their queries."""


def draw_tasks(sampler: EpisodeSampler, features: Tensor, class_means: Tensor, ids: np.ndarray, seed: int) -> TaskBlock:
    """The tasks numbered `ids` from a split's transformed features (n, D) and class means (C, D)."""
    episodes: Episodes = sampler.draw(ids)
    way, shot, query = sampler.way, sampler.shot, sampler.query
    labels = torch.arange(way, device=features.device)
    support = Support(features[episodes.support.reshape(len(ids), -1)], labels.repeat_interleave(shot).expand(len(ids), -1), way)
    return TaskBlock(
        support,
        features[episodes.query.reshape(len(ids), -1)],
        labels.repeat_interleave(query),
        start_noise(ids, way, features.shape[1], seed).to(features.device),
        class_means[episodes.classes],
        int(np.random.SeedSequence([seed, int(ids[0]), 1]).generate_state(1)[0]),
    )


def start_noise(ids: np.ndarray, way: int, dim: int, seed: int) -> Tensor:
    """w_T ~ N(0, I), (B, N, D): the same for a task whatever else is drawn with it. Algorithm 2, line 2."""
    generator = torch.Generator()
    seeds = (int(np.random.SeedSequence([seed, int(task)]).generate_state(1, np.uint64)[0] >> 1) for task in ids)
    return torch.stack([torch.randn(way, dim, generator=generator.manual_seed(s)) for s in seeds])


def systems(
    denoiser: Denoiser, untrained: Denoiser, learner: Learner, schedule: Schedule, sampler: SamplerConfig, settings: EvaluateConfig
) -> dict[str, System]:
    """The rows that stand beside every accuracy."""
    cosine = PrototypeLearner("cosine")

    def diffusion(model: Denoiser) -> System:
        return lambda task: (learner, sample(model, schedule, task.support, task.w_T, sampler, _noise(sampler, task)) / model.target_scale)

    return {
        "metadiff": diffusion(denoiser),
        "class_mean": lambda task: (cosine, task.support.means),
        "gda": lambda task: (learner, gradient_descent(learner, task.support, task.w_T, settings.gda_learning_rate, settings.gda_steps)),
        "identity": diffusion(denoiser.network_off()),
        "untrained": diffusion(untrained),
        "oracle": lambda task: (cosine, task.full_means),
    }


@torch.inference_mode()
def gradient_descent(learner: Learner, support: Support, w: Tensor, learning_rate: float, steps: int) -> Tensor:
    """Plain gradient descent on the support cross-entropy, from `w` (B, N, D). Eq. 4."""
    for _ in range(steps):
        w = w - learning_rate * learner.ce_gradient(w, support)
    return w


@dataclass(frozen=True)
class Scores:
    """How every system did on some tasks.

    Attributes:
        accuracy: (tasks,) of each system.
        seconds: what each system took for all of them.
    """

    accuracy: Mapping[str, np.ndarray]
    seconds: Mapping[str, float]

    @classmethod
    def joined(cls, parts: Sequence["Scores"]) -> "Scores":
        """The scores on all tasks of the parts, in their order."""
        names = parts[0].accuracy
        accuracy = {name: np.concatenate([part.accuracy[name] for part in parts]) for name in names}
        return cls(accuracy, {name: sum(part.seconds[name] for part in parts) for name in names})


def blocks(num_tasks: int, size: int = BLOCK) -> list[range]:
    """Task numbers 0 .. num_tasks - 1 in the blocks that are scored at once: the same ones whoever scores them."""
    return [range(start, min(start + size, num_tasks)) for start in range(0, num_tasks, size)]


@torch.inference_mode()
def score(rows: Mapping[str, System], task: TaskBlock) -> Scores:
    """The scores of every system on one block of tasks."""
    accuracy, seconds = {}, {}
    for name, system in rows.items():
        began = time.perf_counter()
        right = predictions(*system(task), task) == task.labels
        accuracy[name] = right.double().mean(1).cpu().numpy()
        seconds[name] = time.perf_counter() - began
    return Scores(accuracy, seconds)


def predictions(learner: Learner, w: Tensor, task: TaskBlock) -> Tensor:
    """(B, N Q) predicted ways (Eq. 9); -1, which is never right, where diverged weights give no finite logits."""
    logits = learner.logits(w, task.query)
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def interval(values: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean: 1.96 s / sqrt(n)."""
    return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def result_rows(scores: Scores, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a system, with paired differences to class means and to identity; all fractions."""
    rows = []
    for name, values in scores.accuracy.items():
        row: dict[str, Any] = {"system": name, **common, "tasks": len(values), "accuracy": float(values.mean()), "ci95": interval(values)}
        for baseline in ("class_mean", "identity"):
            difference = values - scores.accuracy[baseline]
            row |= {f"minus_{baseline}": float(difference.mean()), f"minus_{baseline}_ci95": interval(difference)}
        rows.append(row | {"seconds": round(scores.seconds[name], 3)})
    return rows


@torch.inference_mode()
def trace(denoiser: Denoiser, learner: Learner, schedule: Schedule, sampler: SamplerConfig, task: TaskBlock) -> dict[str, Any]:
    """Query accuracy and cross-entropy along the denoising steps, at about 50 of them, beside that of class means. Figure 5."""
    # By position: a few-step sampler visits other t than the multiples of twenty.
    wanted = {round(place) for place in np.linspace(0, sampler.evaluations(schedule.num_steps), TRACE_POINTS)}
    by_means = predictions(PrototypeLearner("cosine"), task.support.means, task) == task.labels
    curves: dict[str, Any] = {"t": [], "accuracy": [], "loss": [], "class_mean_accuracy": float(by_means.double().mean())}
    steps = denoise_steps(denoiser, schedule, task.support, task.w_T, sampler, _noise(sampler, task))
    for place, (t, w) in enumerate(steps):
        if place in wanted:
            logits = learner.logits(w / denoiser.target_scale, task.query)
            loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), task.labels.repeat(len(w))))
            right = predictions(learner, w / denoiser.target_scale, task) == task.labels
            curves["t"].append(t)
            curves["accuracy"].append(float(right.double().mean()))
            curves["loss"].append(loss if math.isfinite(loss) else None)
    return curves


def _noise(sampler: SamplerConfig, task: TaskBlock) -> torch.Generator | None:
    return torch.Generator(task.w_T.device).manual_seed(task.seed) if sampler.stochastic else None
