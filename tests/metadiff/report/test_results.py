import csv
import math
from typing import Any

import pytest

from metadiff.report import results_table
from metadiff.report.results import Verdict, percent, results_csv, results_markdown, sections, verdict


def row(system: str = "metadiff", preset: str = "stable", **changes: Any) -> dict[str, Any]:
    numbers = {"accuracy": 0.6231, "ci95": 0.0042, "minus_class_mean": 0.0112, "minus_class_mean_ci95": 0.002, "seconds": 1.5}
    return {"system": system, "preset": preset, "way": 5, "shot": 1, "tasks": 600} | numbers | changes


def results(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    protocol = {"dataset": "glyphs", "split": "novel", "way": 5, "query": 15, "tasks": 600, "shots": [1, 5], "seed": 3}
    return {"protocol": protocol | {"interval": "95 %", "tuned_on": False} | changes, "rows": list(rows)}


BASELINE = row("class_mean", accuracy=0.6119, minus_class_mean=None, minus_class_mean_ci95=None)


@pytest.mark.parametrize(
    ("difference", "ci95", "expected"),
    [
        (0.02, 0.01, Verdict.ABOVE),
        (0.25, 0.25, Verdict.LEVEL),  # the interval touches zero
        (math.nextafter(0.25, 1), 0.25, Verdict.ABOVE),
        (0.0, 0.0, Verdict.LEVEL),
        (-0.01, 0.02, Verdict.LEVEL),
        (-0.25, 0.25, Verdict.LEVEL),
        (math.nextafter(-0.25, -1), 0.25, Verdict.BELOW),
        (0.5, None, Verdict.UNKNOWN),
        (None, 0.1, Verdict.UNKNOWN),
        (0.5, math.nan, Verdict.UNKNOWN),
        (math.nan, 0.1, Verdict.UNKNOWN),
        (math.inf, 0.1, Verdict.UNKNOWN),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side_of_zero(difference: float | None, ci95: float | None, expected: Verdict) -> None:
    assert verdict(difference, ci95) is expected


@pytest.mark.parametrize(
    ("mean", "ci95", "signed", "text"),
    [
        (0.6231, 0.0042, False, "62.31 ± 0.42"),
        (0.0112, 0.002, True, "+1.12 ± 0.20"),
        (-0.0112, 0.002, True, "-1.12 ± 0.20"),
        (-0.00001, 0.002, True, "+0.00 ± 0.20"),
        (0.5, None, False, "50.00"),
        (0.5, math.nan, False, "50.00"),
        (None, None, False, "n/a"),
        (math.nan, 0.1, False, "diverged"),
        (math.inf, 0.1, False, "diverged"),
    ],
)
def test_fractions_are_shown_in_percent(mean: float | None, ci95: float | None, signed: bool, text: str) -> None:
    assert percent(mean, ci95, signed) == text


def test_table_for_the_terminal() -> None:
    assert results_table([results(BASELINE, row())]).splitlines() == [
        "glyphs, novel classes: 5-way 1-shot, 600 tasks of 15 queries a class, seed 3",
        "preset  system      accuracy      minus class means  verdict",
        "-" * 70,
        "stable  metadiff    62.31 ± 0.42  +1.12 ± 0.20       above class means",
        "stable  class_mean  61.19 ± 0.42                     the baseline",
        "",
        "Accuracy in % with 95 % intervals; the difference to class means is paired, task by task.",
    ]


def test_rows_of_one_protocol_stand_together_across_variants() -> None:
    one = results(row(), row(shot=5))
    two = results(row(preset="paper", shot=5), row(preset="paper"))
    found = sections([one, two])
    assert [(section.shot, [row["preset"] for row in rows]) for section, rows in found.items()] == [
        (1, ["stable", "paper"]),
        (5, ["stable", "paper"]),
    ]


def test_validation_rows_are_kept_apart_and_marked_wherever_they_are_shown() -> None:
    both = [results(row(), split="val", tuned_on=True), results(row())]
    assert [section.tuned_on for section in sections(both)] == [False, True]
    assert results_table(both).count("val classes (tuned on)") == 1
    assert results_markdown(both).count("val classes (tuned on)") == 1
    assert [line["tuned_on"] for line in csv.DictReader(results_csv(both).splitlines())] == ["False", "True"]


def test_what_diverged_is_said_so_and_gets_no_verdict() -> None:
    broken = row(accuracy=math.nan, ci95=math.nan, minus_class_mean=math.nan, minus_class_mean_ci95=math.nan)
    line = results_table([results(broken)]).splitlines()[3]
    assert line.split() == ["stable", "metadiff", "diverged", "n/a"]


def test_what_was_not_measured_is_said_so() -> None:
    line = results_table([results(row(minus_class_mean=None, minus_class_mean_ci95=None))]).splitlines()[3]
    assert line.endswith("n/a                n/a")


@pytest.mark.parametrize("nothing", [[], [results()]])
def test_no_results(nothing: list[dict[str, Any]]) -> None:
    assert results_table(nothing) == "No results: nothing has been evaluated."
    assert results_markdown(nothing) == "Nothing has been evaluated.\n"
    assert len(results_csv(nothing).splitlines()) == 1


def test_markdown_cells_cannot_break_out() -> None:
    line = results_markdown([results(row(preset="a|b"))]).splitlines()[-1]
    assert line == "| a\\|b | metadiff | 62.31 ± 0.42 | +1.12 ± 0.20 | above class means |"


def test_csv_keeps_fractions() -> None:
    lines = list(csv.DictReader(results_csv([results(row(), BASELINE)]).splitlines()))
    assert [float(line["accuracy"]) for line in lines] == [0.6231, 0.6119]
    assert (lines[0]["verdict"], lines[1]["verdict"], lines[1]["minus_class_mean"]) == ("above class means", "the baseline", "")
