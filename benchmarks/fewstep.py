"""The sampler that the gate takes, beside the textbook's thousand steps: seconds a task, and both accuracies on the same tasks."""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.tasks import LEARNER, SEED, Tasks, new_denoiser
from metadiff.denoiser import Denoiser, Preset
from metadiff.evaluation import TaskBlock, interval, predictions
from metadiff.optimisation import Optimisation, TrainConfig
from metadiff.sampler_gate import Choice, candidates, choose, reference
from metadiff.samplers import SamplerConfig, sample
from metadiff.schedule import Schedule, ScheduleConfig

_BATCH, _BLOCK = 128, 256


def few_steps(
    per_task: Callable[[Callable[[], Any], argparse.Namespace], float], tasks: Tasks, options: argparse.Namespace, known: dict[str, Any]
) -> dict[str, Any]:
    """A `consistent` denoiser is trained for a while, and its sampler gated on tasks of unseen classes; other such tasks are reported on.

    The textbook's architecture is trained for as long (its accuracy is that of `metadiff.samplers`' exact steps, which agree with the
    textbook's own; see `sample_difference_to_textbook`).
    """
    schedule = Schedule(ScheduleConfig(num_steps=20 if options.quick else 1000))
    ours, theirs = (trained(preset, schedule, tasks, options.iterations) for preset in ("consistent", "official"))
    gated = gate(ours, schedule, [tasks.block(part) for part in blocks(options.tasks, 2 * options.tasks)])
    shown = [tasks.block(part) for part in blocks(0, options.tasks)]
    everything = tasks.block(range(options.tasks))
    seconds = per_task(lambda: sample(ours, schedule, everything.support, everything.w_T, gated.sampler), options)
    few, exact, textbook = (
        accuracies(model, schedule, shown, sampler)
        for model, sampler in ((ours, gated.sampler), (ours, reference()), (theirs, reference()))
    )
    means = np.concatenate([right(block.support.means, block) for block in shown])
    return {
        "fewstep_ratio": round(known["sample_textbook_s_per_task"] / seconds, 1),
        "fewstep_sampler": f"{gated.sampler.method} {gated.sampler.evaluations(schedule.num_steps)} {gated.sampler.spacing}",
        "fewstep_gated": gated.gated,
        "fewstep_tasks_per_s": round(1 / seconds, 1),
        "fewstep_accuracy": percent(few),
        "fewstep_minus_all_steps": f"{percent(few - exact)} +- {100 * interval(few - exact):.2f}",
        "textbook_accuracy": percent(textbook),
        "class_mean_accuracy": percent(means),
        "gate_trace": [
            f"{row['method']} {row['evaluations']}: {100 * row['difference']:+.2f} +- {100 * row['ci95']:.2f}" for row in gated.trace
        ],
    }


def trained(preset: Preset, schedule: Schedule, tasks: Tasks, iterations: int) -> Denoiser:
    denoiser = new_denoiser(preset, schedule)
    state = Optimisation(denoiser, schedule, TrainConfig(iterations=iterations, batch_size=_BATCH, learning_rate=3e-4), SEED)
    for step in range(iterations):
        state.iterate(step, *tasks.batch(step, _BATCH))
    return denoiser.eval()


def gate(denoiser: Denoiser, schedule: Schedule, tasks: list[TaskBlock]) -> Choice:
    among = candidates(schedule.num_steps)
    scores = [accuracies(denoiser, schedule, tasks, sampler) for sampler in among]
    return choose(among, accuracies(denoiser, schedule, tasks, reference()), scores, schedule.num_steps)


def accuracies(denoiser: Denoiser, schedule: Schedule, tasks: list[TaskBlock], sampler: SamplerConfig) -> np.ndarray:
    """(tasks,) of a sampler, 0 .. 1."""
    return np.concatenate([right(sample(denoiser, schedule, block.support, block.w_T, sampler), block) for block in tasks])


def right(w: torch.Tensor, block: TaskBlock) -> np.ndarray:
    """(B,): the accuracy of each task's weights on its queries."""
    return (predictions(LEARNER, w, block) == block.labels).double().mean(1).numpy()


def blocks(start: int, stop: int) -> list[range]:
    return [range(first, min(first + _BLOCK, stop)) for first in range(start, stop, _BLOCK)]


def percent(values: np.ndarray) -> float:
    return round(100 * float(values.mean()), 2)
