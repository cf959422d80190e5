"""The stage `evaluate` on actors: whatever their number, the same numbers, those of one process; what is done stays done."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distributed.pipeline import main
from metadiff.__main__ import main as in_one_process
from metadiff.evaluation import BLOCK
from metadiff.pieces import ENSEMBLE_BLOCK
from tests.tiny import write_config

EVALUATE = {"num_tasks": BLOCK + 4, "sampler": "auto", "gate_tasks": BLOCK + 2, "ensemble": 2, "ensemble_tasks": ENSEMBLE_BLOCK + 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that one process has trained."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([str(config(folder, 0))], "train") == 0
    return folder / "runs" / "tiny"


def config(folder: Path, actors: int) -> Path:
    return write_config(folder, evaluate=EVALUATE, loader={"kind": "memory"}, ray={"num_workers": 0, "num_actors": actors})


def evaluated(trained: Path, folder: Path, actors: int | None) -> dict[str, Any]:
    """The evaluation by some actors; None: by `python -m metadiff`."""
    shutil.copytree(trained, folder / "runs" / "tiny")
    words = str(config(folder, actors or 0))
    assert (in_one_process(["evaluate", words]) if actors is None else main([words], "evaluate")) == 0
    made = folder / "runs/tiny/evaluate/stable"
    assert not list(made.glob("*.part*"))
    found = json.loads((made / "results.json").read_text())
    for row in found["rows"]:
        del row["seconds"]
    return {"results": found, **{name: json.loads((made / f"{name}.json").read_text()) for name in ("trace", "examples")}}


def test_with_any_number_of_actors_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    alone = evaluated(trained, tmp_path / "alone", None)
    assert set(alone["results"]) == {"protocol", "sampler", "rows", "ensemble"}
    assert alone["results"]["sampler"]["1"]["tasks"] == BLOCK + 2
    for actors in (0, 1, 2):
        assert evaluated(trained, tmp_path / str(actors), actors) == alone
