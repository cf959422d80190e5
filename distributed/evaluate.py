"""The stage `evaluate`: Ray actors score ranges of tasks; the numbers do not depend on how many there are."""

import json
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from distributed.config import EngineConfig, here
from distributed.runtime import work_through
from metadiff import stages
from metadiff.artifact import write_atomically
from metadiff.evaluation import Scores, blocks
from metadiff.pipeline import Run
from metadiff.scoring import Scoring, rows

Block = tuple[int, range | None]
"""The number of shots, and tasks to score; None for the curves and pictures of the report."""


def build(run: Run, folder: Path) -> None:
    """Do what has not been done yet, block by block, and gather the rows."""
    if not (folder / stages.RESULTS).exists():
        _score(run, folder)
    for part in folder.glob(f"*{stages.PART}"):
        part.unlink()


def _score(run: Run, folder: Path) -> None:
    settings = cast(EngineConfig, run.config)
    every = [(shot, tasks) for shot in settings.episodes.shots for tasks in (None, *blocks(settings.evaluate.num_tasks))]
    todo = [block for block in every if not _file(folder, block).exists()]
    with tqdm(total=sum(map(_num_tasks, todo)), desc=f"evaluate {run.variant}", unit="task", mininterval=1.0) as progress:
        for block, found in work_through(ScoringWorker, (run,), todo, settings.ray):
            write_atomically(_file(folder, block), json.dumps(found).encode())
            progress.update(_num_tasks(block))
    stages.write_results(run, folder, {shot: _gathered(run, folder, shot) for shot in settings.episodes.shots})


class ScoringWorker:
    """An actor with the systems of each number of shots."""

    def __init__(self, run: Run) -> None:
        self._scoring = cache(partial(Scoring, here(run)))

    def run(self, block: Block) -> dict[str, Any]:
        """The scores of the block's tasks, or the illustrations, as JSON values."""
        shot, tasks = block
        scoring = self._scoring(shot)
        if tasks is None:
            return scoring.illustrations()
        scores = scoring.score(tasks)
        return {"accuracy": {name: values.tolist() for name, values in scores.accuracy.items()}, "seconds": dict(scores.seconds)}


def _gathered(run: Run, folder: Path, shot: int) -> dict[str, Any]:
    parts = [_read(_file(folder, (shot, tasks))) for tasks in blocks(run.config.evaluate.num_tasks)]
    scores = [Scores({name: np.array(values) for name, values in part["accuracy"].items()}, part["seconds"]) for part in parts]
    return {"rows": rows(run, shot, Scores.joined(scores)), **_read(_file(folder, (shot, None)))}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _num_tasks(block: Block) -> int:
    return len(block[1] or ())


def _file(folder: Path, block: Block) -> Path:
    shot, tasks = block
    return folder / f"{shot}shot.{'illustrations' if tasks is None else f'{tasks.start:09d}'}{stages.PART}"


STAGE = replace(stages.STAGES["evaluate"], build=build)

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="evaluate"))
