"""The stage `evaluate`: Ray actors score ranges of tasks; the numbers do not depend on how many there are."""

import json
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from distributed.config import EngineConfig, here
from distributed.runtime import work_through
from metadiff import stages
from metadiff.artifact import write_atomically
from metadiff.evaluation import Scores, blocks
from metadiff.pipeline import Run
from metadiff.scoring import Scoring

Block = tuple[int, range]
"""The number of shots, and the tasks."""


def build(run: Run, folder: Path) -> None:
    """Score what has not been scored yet, block by block, and gather the rows."""
    settings = cast(EngineConfig, run.config)
    every = [(shot, tasks) for shot in settings.episodes.shots for tasks in blocks(settings.evaluate.num_tasks)]
    todo = [block for block in every if not _file(folder, block).exists()]
    with tqdm(total=sum(len(tasks) for _, tasks in todo), desc="evaluate", unit="task", mininterval=1.0) as progress:
        for block, scores in work_through(ScoringWorker, (run,), todo, settings.ray):
            write_atomically(_file(folder, block), _to_json(scores))
            progress.update(len(block[1]))
    stages.evaluate_systems(run, folder, lambda scoring, shot, _: [_read(_file(folder, (shot, tasks))) for tasks in scoring.blocks])
    for block in every:
        _file(folder, block).unlink(missing_ok=True)


class ScoringWorker:
    """An actor with the systems of each number of shots."""

    def __init__(self, run: Run) -> None:
        self._scoring = cache(partial(Scoring, here(run)))

    def run(self, block: Block) -> Scores:
        """The scores of the block's tasks."""
        shot, tasks = block
        return self._scoring(shot).score(tasks)


def _file(folder: Path, block: Block) -> Path:
    shot, tasks = block
    return folder / f"{shot}shot.{tasks.start:09d}.part.json"


def _to_json(scores: Scores) -> bytes:
    accuracy = {name: values.tolist() for name, values in scores.accuracy.items()}
    return json.dumps({"accuracy": accuracy, "seconds": dict(scores.seconds)}).encode()


def _read(path: Path) -> Scores:
    parts = json.loads(path.read_text())
    return Scores({name: np.array(values) for name, values in parts["accuracy"].items()}, parts["seconds"])


STAGE = replace(stages.STAGES["evaluate"], build=build)

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="evaluate"))
