"""The stage `prepare`: images to arrays and, for FFCV, to one `.beton` file a split."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import cast

from distributed.beton import beton_name, write_beton
from distributed.config import EngineConfig
from metadiff import stages
from metadiff.datasets.source import SPLITS
from metadiff.images import ImageSet
from metadiff.pipeline import Run


def build(run: Run, folder: Path) -> None:
    """Decode the data set into arrays, then write what FFCV reads."""
    settings = cast(EngineConfig, run.config)
    stages.prepare(run, folder)
    if settings.loader.kind == "memory":
        return
    for split in [split for split in SPLITS if (folder / f"{split}.classes.json").exists()]:
        write_beton(folder / beton_name(split), ImageSet.read(folder, split), settings.beton, f"beton {split}")


_IN_PROCESS = stages.STAGES["prepare"]
STAGE = replace(_IN_PROCESS, build=build, sections=(*_IN_PROCESS.sections, "beton", "loader.kind"))

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="prepare"))
