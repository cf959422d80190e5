"""One number of shots of a run being scored: its tasks and its systems, opened from the run's artifacts."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from metadiff.checkpoint import load_state
from metadiff.denoiser import Denoiser, build_denoiser
from metadiff.episodes import EpisodeSampler
from metadiff.evaluation import Scores, blocks, draw_tasks, predictions, result_rows, score, systems, trace
from metadiff.features import FeatureBank, FeatureTransform
from metadiff.learners import build_learner
from metadiff.pipeline import Run
from metadiff.schedule import Schedule
from metadiff.targets import Targets, class_means
from metadiff.training import load_denoiser

TRANSFORM = "transform.safetensors"
_SEED = 1_000_003
_PICTURED_TASKS = 2


class Scoring:
    """The systems of one number of shots, and the tasks that they are scored on."""

    def __init__(self, run: Run, shot: int) -> None:
        self._run = run
        settings, protocol, seed = run.config.evaluate, run.config.episodes, run.config.seed + _SEED
        bank = FeatureBank.open(run.artifacts["embed"], settings.split)
        features = open_transform(run.artifacts["fit_targets"].file(TRANSFORM))(bank.features).to(run.device)
        self._sampler = EpisodeSampler(bank.offsets, protocol.way, shot, protocol.query, seed, settings.split)
        self._tasks = partial(draw_tasks, self._sampler, features, class_means(features, bank.offsets), seed=seed)

        self._learner, self._schedule = build_learner(run.config.learner), Schedule(run.config.schedule, run.device)
        untrained = new_denoiser(run, self._schedule, run.config.seed).to(run.device)
        weights = run.artifacts["train"].file(f"{shot}shot.safetensors")
        self._denoiser = load_denoiser(weights, new_denoiser(run, self._schedule, 0)).to(run.device)
        self._systems = systems(self._denoiser, untrained, self._learner, self._schedule, run.config.sampler, settings)

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return self._run.config.evaluate.num_tasks

    @property
    def blocks(self) -> list[range]:
        """The tasks, in the blocks that are scored at once."""
        return blocks(self.num_tasks)

    def score(self, block: range) -> Scores:
        """Every system on one block of tasks."""
        return score(self._systems, self._tasks(np.array(block)))

    def illustrations(self) -> dict[str, Any]:
        """Curves along the denoising and pictures of the first tasks, for the report."""
        traced = self._tasks(np.arange(min(self._run.config.evaluate.trace_tasks, self.num_tasks)))
        pictured = self._tasks(np.arange(_PICTURED_TASKS))
        return {
            "trace": trace(self._denoiser, self._learner, self._schedule, self._run.config.sampler, traced),
            "examples": self._examples(predictions(*self._systems["metadiff"](pictured), pictured).cpu().numpy()),
        }

    def _examples(self, predicted: np.ndarray) -> dict[str, Any]:
        """Image numbers and predictions of the first tasks, for the report's pictures."""
        episodes = self._sampler.draw(np.arange(len(predicted)))
        parts = {"classes": episodes.classes, "support": episodes.support, "query": episodes.query}
        parts["predicted"] = predicted.reshape(episodes.query.shape)
        return {name: array.tolist() for name, array in parts.items()}


def rows(run: Run, shot: int, scores: Scores) -> list[dict[str, Any]]:
    """The rows of one number of shots over the scores of all its tasks, in order."""
    return result_rows(scores, {"preset": run.config.denoiser.preset, "way": run.config.episodes.way, "shot": shot})


def protocol(run: Run) -> dict[str, Any]:
    """What the rows were measured under."""
    settings = run.config
    return {
        "dataset": settings.data.kind,
        "backbone": settings.pretrain.backbone,
        "split": settings.evaluate.split,
        "tuned_on": settings.evaluate.split == "val",
        "way": settings.episodes.way,
        "shots": list(settings.episodes.shots),
        "query": settings.episodes.query,
        "tasks": settings.evaluate.num_tasks,
        "learner": settings.learner.kind,
        "steps": settings.schedule.num_steps,
        "seed": settings.seed,
        "interval": "95 %, 1.96 s / sqrt(tasks); differences are paired by task",
    }


def new_denoiser(run: Run, schedule: Schedule, seed: int) -> Denoiser:
    """An untrained denoiser for the run's targets."""
    targets = Targets.open(run.artifacts["fit_targets"])
    return build_denoiser(run.config.denoiser, targets.dim, build_learner(run.config.learner), schedule, targets.scale, seed)


def open_transform(path: Path) -> FeatureTransform:
    """The features' transform that was fixed with the targets."""
    return FeatureTransform(**load_state(path))
