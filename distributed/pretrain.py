"""The stage `pretrain`: the backbone's classifier loop in Ray Train's workers, fed by FFCV."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from distributed.config import EngineConfig, loader_of_one
from distributed.loaders import FFCVLoader
from distributed.tensorboard import tensorboard_log
from distributed.workers import launch, place
from metadiff import stages
from metadiff.images import ImageLoader, ImageSet
from metadiff.parallel import Ranks
from metadiff.pipeline import Run


def build(run: Run, folder: Path) -> None:
    """Pretrain in as many workers as the configuration says; of [fewest, most], the fewest, for batch norm sees their number."""
    launch(_pretrain, {"run": run, "folder": folder}, cast(EngineConfig, run.config).ray, run.folder / ".ray")


def _pretrain(ranks: Ranks, run: Run, folder: Path) -> None:
    load = partial(_ffcv_loader, run, ranks) if cast(EngineConfig, run.config).loader.kind == "ffcv" else None
    log = tensorboard_log(run.folder / "tensorboard" / "pretrain", "epoch")
    stages.pretrain_backbone(place(run, ranks), folder, load, ranks, log)


def _ffcv_loader(run: Run, ranks: Ranks, base: ImageSet) -> ImageLoader:
    settings = cast(EngineConfig, run.config)
    return FFCVLoader(
        run.artifacts["prepare"],
        "base",
        settings.pretrain.batch_size,
        settings.pretrain.augment,
        settings.seed,
        loader_of_one(settings, settings.ray.workers[0]),
        ranks,
    )


_IN_PROCESS = stages.STAGES["pretrain"]
STAGE = replace(_IN_PROCESS, build=build, sections=(*_IN_PROCESS.sections, "loader.kind"))

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="pretrain"))
