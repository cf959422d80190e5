"""What the page says about ensembles of sampled weights."""

from typing import Any

from metadiff.report import Variant
from metadiff.report.uncertainty import uncertainty_html, uncertainty_markdown

BINS = [{"queries": 100, "confidence": 0.3, "accuracy": 0.5}, {"queries": 300, "confidence": 0.8, "accuracy": 0.7}]


def row(system: str, **differences: float) -> dict[str, Any]:
    measures = {"accuracy": 0.65, "accuracy_ci95": 0.01, "ece": 0.125, "ece_ci95": 0.004, "brier": 0.4567, "brier_ci95": 0.0089}
    widths = {f"{name}_ci95": 0.002 for name in differences}
    return {"system": system, "bins": BINS} | measures | differences | widths


def variant(name: str = "stable", split: str = "novel") -> Variant:
    less = {"accuracy_minus_single": -0.01, "ece_minus_single": -0.05, "brier_minus_single": 0.0123}
    rows = [row("ensemble", **less), row("single"), row("class_mean", **less)]
    record = {"members": 8, "tasks": 1200, "sampler": {"method": "eq8"}, "evaluations": 1000, "rows": rows}
    results = {"protocol": {"split": split, "tuned_on": split == "val"}, "rows": [], "ensemble": {"5": record}}
    return Variant(name, results, {}, {}, [])


def test_table_and_diagram() -> None:
    html = uncertainty_html([variant()])
    assert "5-shot, novel classes, 1,200 tasks, 8 weights a task by Eq. 8, 1000 steps" in html
    for words in ("65.00 ± 1.00", "12.50 ± 0.40", "0.4567 ± 0.0089", "\u22121.00 ± 0.20", "\u22125.00 ± 0.20", "+0.0123 ± 0.0020"):
        assert words in html
    assert html.count("<small>\u2212") == 4, "one weight is not held against itself"
    assert 'alt="Accuracy over confidence, stable, 5-shot. Calibration error in percent: many weights 12.50 ± 0.40;' in html
    assert "tuned on" not in html


def test_presets_stand_together_by_shot_with_a_mark_where_settings_were_tuned() -> None:
    html = uncertainty_html([variant("stable", "val"), variant("consistent", "val")])
    assert html.count("<tbody>") == 1
    assert html.count("tuned on") == 6
    assert html.count("<img") == 2


def test_names_are_escaped() -> None:
    html = uncertainty_html([variant("<b>&")])
    assert "<b>&<" not in html
    assert "&lt;b&gt;&amp;" in html


def test_markdown() -> None:
    lines = uncertainty_markdown([variant("a|b", "val")]).splitlines()
    assert lines[1] == "**Uncertainty: val classes, 1,200 tasks, 8 weights a task by Eq. 8, 1000 steps**"
    assert lines[3] == "| Shots | Preset | Prediction | Accuracy, % | Calibration error, % | Brier score |"
    assert lines[5] == "| 5 | a\\|b (tuned on) | many weights | 65.00 ± 1.00 | 12.50 ± 0.40 | 0.4567 ± 0.0089 |"
    assert len(lines) == 8


def test_older_results_have_nothing_to_show() -> None:
    older = [Variant("older", {"protocol": {}, "rows": []}, {}, {}, [])]
    assert uncertainty_html(older) == uncertainty_markdown(older) == ""
