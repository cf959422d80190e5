"""The stage `evaluate`: Ray actors do its pieces; the numbers do not depend on how many there are."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from distributed.config import EngineConfig, here
from distributed.runtime import work_through
from metadiff import stages
from metadiff.pieces import Piece, PieceWorker, Samplers, evaluate
from metadiff.pipeline import Run


def build(run: Run, folder: Path) -> None:
    """Do what has not been done yet, piece by piece, and put them together."""
    evaluate(run, folder, _by_actors)


class EvaluationWorker(PieceWorker):
    """An actor with the systems of each number of shots."""

    def __init__(self, run: Run, samplers: Samplers) -> None:
        super().__init__(here(run), samplers)


def _by_actors(run: Run, samplers: Samplers, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Any]]:
    return work_through(EvaluationWorker, (run, samplers), pieces, cast(EngineConfig, run.config).ray)


STAGE = replace(stages.STAGES["evaluate"], build=build)

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="evaluate"))
