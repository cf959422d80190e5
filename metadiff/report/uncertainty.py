"""What the averaged predictions of many sampled weights are worth beside one, as HTML: accuracy, calibration, reliability diagrams."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from metadiff.report.accuracies import TUNED_ON, minus
from metadiff.report.content import Variant
from metadiff.report.figures import FORECASTS, panel, reliability_panel
from metadiff.report.results import percent
from metadiff.report.sampling import sampler_name

_MEASURES = {"accuracy": "Accuracy, %", "ece": "Calibration error, %", "brier": "Brier score"}
_HEAD = (
    "<thead><tr><th>Preset</th><th>Prediction</th>"
    + "".join(f'<th class="number">{title}<br><small>minus one weight</small></th>' for title in _MEASURES.values())
    + "</tr></thead>"
)
_NOTE = (
    "How far predicted probabilities can be believed. <b>Many weights</b>: sampled with the noise &sigma;<sub>t</sub>z kept (Term 3 of the "
    "paper), each from a w<sub>T</sub> of its own, their probabilities averaged. <b>One weight</b>: sampled without it. The calibration "
    "error is the mean distance of confidence from accuracy over 15 bins of confidence (Guo et al., 2017), the Brier score the squared "
    "error of the probabilities: of both, less is better. 95 % intervals, on the same tasks."
)
_DIAGRAMS = (
    '<p class="note">How many of the queries that are predicted with some confidence are right; dashed: as many as the confidence says. '
    "Below, how the queries are spread over the confidences. Bins with few queries are left out of the curves.</p>"
)


def uncertainty_html(variants: Sequence[Variant]) -> str:
    """A table and the diagrams, by shot and preset; empty where no weights were sampled."""
    shots = sorted({shot for variant in variants for shot in variant.ensembles}, key=int)
    found = {shot: [variant for variant in variants if shot in variant.ensembles] for shot in shots}
    if not found:
        return ""
    bodies = "".join(_body(shot, those) for shot, those in found.items())
    panels = "".join(_panel(shot, variant) for shot, those in found.items() for variant in those)
    diagrams = f'<h3>Reliability</h3>{_DIAGRAMS}<div class="panels">{panels}</div>'
    return f'<p class="note">{_NOTE}</p><div class="scroll"><table>{_HEAD}{bodies}</table></div>{diagrams}'


def uncertainty_markdown(variants: Sequence[Variant]) -> str:
    """The table as Markdown, with a line before it; empty where no weights were sampled."""
    lines = [
        (shot, _name(variant), FORECASTS[row["system"]][0], *(_shown(row, measure) for measure in _MEASURES))
        for variant in variants
        for shot, record in variant.ensembles.items()
        for row in record["rows"]
    ]
    if not lines:
        return ""
    lines.sort(key=lambda line: int(line[0]))
    abouts = dict.fromkeys(_about(variant, record) for variant in variants for record in variant.ensembles.values())
    table = [("Shots", "Preset", "Prediction", *_MEASURES.values()), ("---:", "---", "---", "---:", "---:", "---:"), *lines]
    return f"\n**Uncertainty: {'; '.join(abouts)}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)


def _name(variant: Variant) -> str:
    return variant.name.replace("|", "\\|") + " (tuned on)" * variant.results["protocol"]["tuned_on"]


def _body(shot: str, variants: Sequence[Variant]) -> str:
    lines = "".join(
        _line(variant, row, index > 0 and place == 0)
        for index, variant in enumerate(variants)
        for place, row in enumerate(variant.ensembles[shot]["rows"])
    )
    abouts = dict.fromkeys(_about(variant, variant.ensembles[shot]) for variant in variants)
    title = f"{shot}-shot, {'; '.join(abouts)}"
    return f'<tbody><tr><th colspan="5" scope="rowgroup"><span>{title}</span></th></tr>{lines}</tbody>'


def _about(variant: Variant, record: Mapping[str, Any]) -> str:
    split = variant.results["protocol"]["split"]
    return (
        f"{split} classes, {record['tasks']:,} tasks, {record['members']} weights a task by "
        f"{sampler_name(record['sampler'], record['evaluations'])}"
    )


def _line(variant: Variant, row: Mapping[str, Any], new_preset: bool) -> str:
    badge = TUNED_ON if variant.results["protocol"]["tuned_on"] else ""
    numbers = "".join(f'<td class="number">{_cell(row, measure)}</td>' for measure in _MEASURES)
    kinds = " ".join(["metadiff"] * (row["system"] == "ensemble") + ["new"] * new_preset)
    label, *_ = FORECASTS[row["system"]]
    return f'<tr class="{kinds}"><td>{escape(variant.name)}</td><td>{label}{badge}</td>{numbers}</tr>'


def _cell(row: Mapping[str, Any], measure: str) -> str:
    """A measure, and below it its difference to that of one weight."""
    if f"{measure}_minus_single" not in row:
        return _shown(row, measure)
    return f"{_shown(row, measure)}<br><small>{minus(_shown(row, f'{measure}_minus_single', signed=True))}</small>"


def _shown(row: Mapping[str, Any], measure: str, signed: bool = False) -> str:
    show = _plain if measure.startswith("brier") else percent
    return show(row[measure], row[f"{measure}_ci95"], signed)


def _plain(mean: float, ci95: float, signed: bool = False) -> str:
    return f"{round(mean, 4) + 0.0:{'+' if signed else ''}.4f} ± {ci95:.4f}"


def _panel(shot: str, variant: Variant) -> str:
    rows = variant.ensembles[shot]["rows"]
    errors = "; ".join(f"{FORECASTS[row['system']][0]} {percent(row['ece'], row['ece_ci95'])}" for row in rows)
    alt = f"Accuracy over confidence, {variant.name}, {shot}-shot. Calibration error in percent: {errors}"
    return panel(f"{variant.name}, {shot}-shot", reliability_panel(rows), alt)
