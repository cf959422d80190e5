"""An evaluation in pieces: resumed anywhere, in any order, the same results; the gate's choice; the ensemble."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff.calibration import forecasters, sampled
from metadiff.config import dump, validate
from metadiff.errors import UserError
from metadiff.evaluation import BLOCK
from metadiff.pieces import ENSEMBLE_BLOCK, PART, Piece, PieceWorker, Samplers, evaluate, in_this_process
from metadiff.pipeline import Run, load_config, run_stages
from metadiff.sampler_gate import candidates, reference
from metadiff.samplers import SamplerConfig
from metadiff.scoring import Scoring, traced_sampler
from metadiff.stages import STAGES
from tests.tiny import write_config

FULL = {"num_tasks": BLOCK + 4, "sampler": "auto", "gate_tasks": BLOCK + 2, "ensemble": 2, "ensemble_tasks": ENSEMBLE_BLOCK + 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pieces")


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """A trained tiny run, to be evaluated with all that there is."""
    return trained(folder, evaluate=FULL)


@pytest.fixture(scope="module")
def whole(run: Run, folder: Path) -> Path:
    """Its evaluation, never interrupted."""
    (folder / "whole").mkdir()
    evaluate(run, folder / "whole")
    return folder / "whole"


def trained(folder: Path, *overrides: str, **sections: dict) -> Run:
    return run_stages(load_config(write_config(folder, **sections), overrides), STAGES, "train")


def results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    for row in found["rows"]:
        del row["seconds"]
    return found


def evaluated(run: Run, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    evaluate(run, folder)
    return results(folder)


def test_nothing_but_the_results_is_left(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {"results.json", "trace.json", "examples.json"}
    assert set(results(whole)) == {"protocol", "sampler", "rows", "ensemble"}


def test_interrupted_after_any_piece_it_goes_on(run: Run, whole: Path, tmp_path: Path) -> None:
    done: list[Piece] = []

    def three(run: Run, samplers: Samplers, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Any]]:
        for count, (piece, found) in enumerate(in_this_process(run, samplers, pieces)):
            if count == 3:
                raise KeyboardInterrupt
            done.append(piece)
            yield piece, found

    for _ in range(100):
        try:
            evaluate(run, tmp_path, three)
            break
        except KeyboardInterrupt:
            assert len(list(tmp_path.glob(f"*{PART}"))) == len(done)
    kinds = [piece.kind for piece in done]
    assert len(done) == len({*done}) == 2 * (2 + 1 + 2 + 2), "no piece twice"
    assert kinds[:4] == ["gate"] * 4, "nothing is scored before the sampler is chosen"
    assert results(tmp_path) == results(whole)


def test_neither_the_order_of_pieces_nor_who_does_them_matters(run: Run, whole: Path, tmp_path: Path) -> None:
    def strangers(run: Run, samplers: Samplers, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Any]]:
        for piece in reversed(pieces):
            yield piece, PieceWorker(run, samplers).run(piece)

    evaluate(run, tmp_path, strangers)
    assert results(tmp_path) == results(whole)
    for name in ("trace.json", "examples.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_the_gate_compares_every_candidate_on_validation_tasks(run: Run, whole: Path) -> None:
    found = results(whole)
    expected = candidates(run.config.schedule.num_steps)
    assert {each.evaluations(20) for each in expected} <= set(range(20))
    for shot in (1, 2):
        record = found["sampler"][str(shot)]
        assert (record["split"], record["tasks"]) == ("val", BLOCK + 2)
        assert [(row["method"], row["steps"]) for row in record["trace"]] == [(each.method, each.steps) for each in expected]
        assert record["gated"] == any(row["passed"] for row in record["trace"])
    assert "chosen" in found["protocol"]["sampler"]


def test_its_first_numbers_are_the_reference(run: Run) -> None:
    scoring = Scoring(run, 1, run.config.sampler)
    tasks = range(20)
    first, *others = scoring.gate(tasks)
    block = scoring._gate_tasks[tasks]
    forecast = forecasters(scoring._denoiser, scoring._learner, scoring._schedule, reference(), 1)["single"](block)
    assert np.array_equal(first, (forecast.argmax(-1) == block.labels).double().mean(1).numpy())
    assert len(others) == len(candidates(20))


def test_gate_and_rows_on_the_same_split_have_different_tasks(folder: Path) -> None:
    scoring = Scoring(trained(folder, evaluate=FULL | {"split": "val"}), 1, SamplerConfig())
    gate, scored = scoring._gate_tasks[range(30)], scoring._tasks[range(30)]
    assert not (gate.w_T == scored.w_T).any()
    assert (gate.query != scored.query).any((1, 2)).sum() > 25


def test_rows_use_what_was_chosen(folder: Path, tmp_path: Path) -> None:
    """Without its network the consistent form ends at the anchor in any number of steps: one step of Eq. 8 passes."""
    words = ("denoiser.preset=consistent", "denoiser.body=none", "run.variant=bare")
    chosen = evaluated(trained(folder, *words, evaluate=FULL | {"ensemble": 0}), tmp_path / "auto")
    taken = chosen["sampler"]["1"]
    assert taken["gated"]
    assert taken["evaluations"] < 20
    assert all(row["difference"] == row["ci95"] == 0 for row in taken["trace"])
    assert "ensemble" not in chosen
    sampler = validate(SamplerConfig, taken["taken"], "results.json")
    given = [f"sampler.{key}={json.dumps(value)}" for key, value in dump(sampler).items()]
    same = evaluated(trained(folder, *words, *given, evaluate={"num_tasks": FULL["num_tasks"]}), tmp_path / "given")
    assert same["rows"] == chosen["rows"]
    assert same["sampler"]["1"] == {"taken": dump(sampler), "gated": False, "evaluations": taken["evaluations"]}
    points = {name: len(json.loads((tmp_path / f"{name}/trace.json").read_text())["1"]["t"]) for name in ("auto", "given")}
    assert points == {"auto": 21, "given": taken["evaluations"] + 1}, "all steps of Eq. 8 are drawn, whatever was chosen"


def test_the_ensemble_stands_beside_one_weight_and_class_means(whole: Path) -> None:
    for record in results(whole)["ensemble"].values():
        assert [row["system"] for row in record["rows"]] == ["ensemble", "single", "class_mean"]
        assert record["members"] == 2
        assert record["queries"] == (ENSEMBLE_BLOCK + 1) * 3 * 4
        assert record["sampler"] | {"stochastic": False} == dump(reference()), "where samplers are chosen, all steps of Eq. 8"


def test_the_ensembles_sampler_is_the_given_one_with_its_noise() -> None:
    tiny = "configs/glyphs.yaml"
    given = traced_sampler(load_config(tiny, ["sampler.method=ddim", "sampler.steps=10"]))
    assert sampled(given) == SamplerConfig(method="ddim", steps=10, stochastic=True)
    with pytest.raises(UserError, match=r"evaluate.ensemble.*dpmpp2m.*draws no noise"):
        sampled(traced_sampler(load_config(tiny, ["sampler.method=dpmpp2m"])))


def test_the_line_for_the_log(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate(run, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluate: ")]
    assert [line.partition(": sampler")[0] for line in said[:2]] == ["evaluate: stable 1-shot", "evaluate: stable 2-shot"]
    assert "2 weights: ensemble " in said[2]
