"""The stage `train`: DDP diffusion training of TCUNet in Ray Train's workers."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from distributed.cache import local_copy
from distributed.config import EngineConfig, loader_of_one
from distributed.loaders import FFCVEpisodes
from distributed.tensorboard import tensorboard_log
from distributed.workers import launch, place
from metadiff import stages
from metadiff.artifact import Artifact
from metadiff.episode_images import EpisodeImages, EpisodePlan
from metadiff.parallel import Ranks
from metadiff.pipeline import Run


def build(run: Run, folder: Path) -> None:
    """Train one denoiser for each number of shots, in as many workers as the configuration says."""
    launch(_train, {"run": run, "folder": folder}, cast(EngineConfig, run.config).ray, run.folder / ".ray", elastic=True)


def _train(ranks: Ranks, run: Run, folder: Path) -> None:
    curves = run.folder / "tensorboard" / "train" / run.variant
    run = place(_with_near_targets(run), ranks)
    images = partial(_ffcv_episodes, run) if cast(EngineConfig, run.config).loader.kind == "ffcv" else None
    stages.train_denoisers(run, folder, ranks, lambda shot: tensorboard_log(curves / f"{shot}shot", "iteration"), images)


def _ffcv_episodes(run: Run, plan: EpisodePlan) -> EpisodeImages:
    settings = cast(EngineConfig, run.config)
    return FFCVEpisodes(
        run.artifacts["prepare"],
        "base",
        plan,
        loader_of_one(settings, settings.ray.workers[0]),
        settings.pretrain.augment if settings.train.augment else None,
        settings.seed,
        pinned=run.device.type == "cuda",
    )


def _with_near_targets(run: Run) -> Run:
    """The run with its targets on this node's own disk, if the configuration has a place for them: they are read at random."""
    cache, made = cast(EngineConfig, run.config).store.cache, run.artifacts["fit_targets"]
    if cache is None:
        return run
    near = local_copy({name: made.file(name) for name in made.manifest["files"]}, made.content, cache)
    return replace(run, artifacts={**run.artifacts, "fit_targets": Artifact(near, made.manifest)})


_IN_PROCESS = stages.STAGES["train"]
# Augmented images are the loader's own.
STAGE = replace(_IN_PROCESS, build=build, sections=(*_IN_PROCESS.sections, "loader.kind"))

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="train"))
