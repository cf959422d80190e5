"""The stage `train`: DDP diffusion training of TCUNet in Ray Train's workers."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

from distributed.config import EngineConfig
from distributed.tensorboard import tensorboard_log
from distributed.workers import launch, place
from metadiff import stages
from metadiff.parallel import Ranks
from metadiff.pipeline import Run


def build(run: Run, folder: Path) -> None:
    """Train one denoiser for each number of shots, in as many workers as the configuration says."""
    launch(_train, {"run": run, "folder": folder}, cast(EngineConfig, run.config).ray, run.folder / ".ray")


def _train(ranks: Ranks, run: Run, folder: Path) -> None:
    curves = run.folder / "tensorboard" / "train" / run.variant
    stages.train_denoisers(place(run, ranks), folder, ranks, lambda shot: tensorboard_log(curves / f"{shot}shot", "iteration"))


STAGE = replace(stages.STAGES["train"], build=build)

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="train"))
