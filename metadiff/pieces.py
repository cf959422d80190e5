"""The evaluation of a run in pieces, each on disk as soon as it is done, whoever does them; and what is made of them in the end."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from metadiff.artifact import write_atomically
from metadiff.calibration import Forecasts, calibration_record
from metadiff.config import dump
from metadiff.evaluation import Scores, blocks
from metadiff.pipeline import Run, say
from metadiff.sampler_gate import Choice, candidates, choose
from metadiff.samplers import SamplerConfig
from metadiff.scoring import GATE_SPLIT, Scoring, protocol, rows, traced_sampler

RESULTS = "results.json"
PART = ".part.json"
"""Ends the names of files that are gone when the results are written."""
ENSEMBLE_BLOCK = 32
"""Tasks of an ensemble at once: each costs as much as its many weights do."""

Kind = Literal["gate", "illustrations", "ensemble", "rows"]
Samplers = Mapping[int, SamplerConfig]
"""What the denoisers' rows use, by the number of shots."""


class Piece(NamedTuple):
    """Some tasks of one number of shots, and what to do with them; illustrations have tasks of their own."""

    shot: int
    kind: Kind
    tasks: range = range(0)

    def file(self, folder: Path) -> Path:
        """Where what is found of it lies."""
        return folder / f"{self.shot}shot.{self.kind}.{self.tasks.start:09d}{PART}"


Work = Callable[[Run, Samplers, Sequence[Piece]], Iterable[tuple[Piece, Any]]]
"""Does pieces, in any order, and gives each with what its `PieceWorker` found."""


class PieceWorker:
    """Does pieces, with the systems of each number of shots opened once."""

    def __init__(self, run: Run, samplers: Samplers) -> None:
        self._scoring = cache(lambda shot: Scoring(run, shot, samplers[shot]))

    def run(self, piece: Piece) -> Any:
        """What there is to find, as lists, dictionaries and arrays."""
        scoring = self._scoring(piece.shot)
        if piece.kind == "gate":
            return scoring.gate(piece.tasks)
        if piece.kind == "illustrations":
            return scoring.illustrations()
        if piece.kind == "ensemble":
            return {name: vars(forecasts) for name, forecasts in scoring.forecast(piece.tasks).items()}
        return vars(scoring.score(piece.tasks))


def in_this_process(run: Run, samplers: Samplers, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Any]]:
    """The pieces, one after the other."""
    worker = PieceWorker(run, samplers)
    for piece in pieces:
        yield piece, worker.run(piece)


def evaluate(run: Run, folder: Path, work: Work = in_this_process) -> None:
    """Leave `results.json`, `trace.json` and `examples.json` in `folder`, going on from the pieces that are there."""
    if not (folder / RESULTS).exists():
        samplers, about = _samplers(run, folder, work)
        _do(run, folder, work, samplers, [piece for shot in run.config.episodes.shots for piece in _pieces(run, shot)])
        _write_results(run, folder, about)
    for part in folder.glob(f"*{PART}"):
        part.unlink()


def _do(run: Run, folder: Path, work: Work, samplers: Samplers, pieces: Sequence[Piece]) -> None:
    """Do the pieces that are not there yet."""
    missing = [piece for piece in pieces if not piece.file(folder).exists()]
    total, label = sum(len(piece.tasks) for piece in missing), "choose samplers" if pieces[0].kind == "gate" else "evaluate"
    with tqdm(total=total, desc=f"{label} {run.variant}", unit="task", mininterval=1.0) as progress:
        for piece, found in work(run, samplers, missing):
            write_atomically(piece.file(folder), json.dumps(found, default=np.ndarray.tolist).encode())
            progress.update(len(piece.tasks))


def _pieces(run: Run, shot: int) -> list[Piece]:
    """All of one number of shots but the gate's, the long ones first."""
    settings = run.config.evaluate
    ensemble = blocks(settings.ensemble_tasks, ENSEMBLE_BLOCK) if settings.ensemble else []
    return [
        Piece(shot, "illustrations"),
        *(Piece(shot, "ensemble", tasks) for tasks in ensemble),
        *(Piece(shot, "rows", tasks) for tasks in blocks(settings.num_tasks)),
    ]


def _samplers(run: Run, folder: Path, work: Work) -> tuple[Samplers, dict[str, Any]]:
    """The sampler of each number of shots, and what `results.json` says about it."""
    shots, given, num_steps = run.config.episodes.shots, run.config.sampler, run.config.schedule.num_steps
    if run.config.evaluate.sampler == "given":
        about = {"taken": dump(given), "gated": False, "evaluations": given.evaluations(num_steps)}
        return dict.fromkeys(shots, given), {str(shot): about for shot in shots}
    pieces = [Piece(shot, "gate", tasks) for shot in shots for tasks in blocks(run.config.evaluate.gate_tasks)]
    _do(run, folder, work, dict.fromkeys(shots, given), pieces)
    chosen = {shot: _choice(run, folder, [piece for piece in pieces if piece.shot == shot]) for shot in shots}
    for shot, choice in chosen.items():
        say(f"evaluate: {run.variant} {shot}-shot: sampler {choice}")
    return (
        {shot: choice.sampler for shot, choice in chosen.items()},
        {str(shot): {**choice.record(), "split": GATE_SPLIT} for shot, choice in chosen.items()},
    )


def _choice(run: Run, folder: Path, pieces: Sequence[Piece]) -> Choice:
    reference, *scores = np.concatenate([np.array(_read(folder, piece)) for piece in pieces], axis=1)
    num_steps = run.config.schedule.num_steps
    return choose(candidates(num_steps, run.config.sampler), reference, scores, num_steps)


def _write_results(run: Run, folder: Path, samplers: Mapping[str, Any]) -> None:
    """Put the pieces together; `results.json` is written when all else is done."""
    shots = run.config.episodes.shots
    pieces = {shot: _pieces(run, shot) for shot in shots}
    illustrations = {str(shot): _read(folder, pieces[shot][0]) for shot in shots}
    for name in ("trace", "examples"):
        _write_readable(folder / f"{name}.json", {shot: drawn[name] for shot, drawn in illustrations.items()})
    scores = {shot: Scores.joined([_scores(_read(folder, piece)) for piece in pieces[shot] if piece.kind == "rows"]) for shot in shots}
    results = {"protocol": protocol(run), "sampler": samplers, "rows": [row for shot in shots for row in rows(run, shot, scores[shot])]}
    if run.config.evaluate.ensemble:
        forecasts = {shot: [_forecasts(_read(folder, piece)) for piece in pieces[shot] if piece.kind == "ensemble"] for shot in shots}
        results["ensemble"] = {str(shot): _calibration(run, shot, parts) for shot, parts in forecasts.items()}
    _write_readable(folder / RESULTS, results)


def _scores(found: Mapping[str, Any]) -> Scores:
    return Scores({name: np.array(values) for name, values in found["accuracy"].items()}, found["seconds"])


def _forecasts(found: Mapping[str, Any]) -> dict[str, Forecasts]:
    return {name: Forecasts(**{key: np.array(values) for key, values in parts.items()}) for name, parts in found.items()}


def _calibration(run: Run, shot: int, parts: Sequence[Mapping[str, Forecasts]]) -> dict[str, Any]:
    forecasts = {name: Forecasts.joined([part[name] for part in parts]) for name in parts[0]}
    record = calibration_record(forecasts, run.config.evaluate.ensemble, traced_sampler(run.config), run.config.schedule.num_steps)
    shown = (f"{row['system']} {100 * row['accuracy']:.2f}, {100 * row['ece']:.2f}" for row in record["rows"])
    say(f"evaluate: {run.variant} {shot}-shot: accuracy and calibration error in %, {record['members']} weights: {'; '.join(shown)}")
    return record


def _read(folder: Path, piece: Piece) -> Any:
    return json.loads(piece.file(folder).read_text())


def _write_readable(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content, indent=1).encode())
