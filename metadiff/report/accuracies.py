"""The results as HTML: headline figures, the table, what its rows mean, bars."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from metadiff.report.content import Variant
from metadiff.report.figures import accuracy_bars, panel
from metadiff.report.results import SYSTEMS, Section, Verdict, cells, row_verdict, sections

PRESETS = {
    "stable": "the authors' architecture with gain 1 on small features: the paper's method made to work",
    "consistent": "beyond the paper; untrained it is its anchor classifier, so only an interval above its identity row is a gain",
    "paper": "the text as printed; its gain 2/N keeps the network from predicting the noise: not expected to reach class means",
    "official": "the authors' code; its gain 2K keeps the network from predicting the noise: not expected to reach class means",
}
_MARKS = {Verdict.ABOVE: "▲ ", Verdict.LEVEL: "≈ ", Verdict.BELOW: "▼ ", Verdict.BASELINE: "", Verdict.UNKNOWN: ""}
TUNED_ON = ' <span class="badge">tuned on</span>'
_HEAD = (
    '<thead><tr><th>Preset</th><th>System</th><th class="number">Accuracy, %</th><th class="number">Minus class means</th>'
    '<th>Verdict</th><th class="number">Seconds</th></tr></thead>'
)
_READING = (
    '<p class="note">Mean accuracy over the tasks with its 95 % interval. The difference to class means is paired: both classify the same '
    "queries of the same tasks. The verdict says “above” or “below” only where the whole interval of the difference lies on that side of "
    "zero.</p>"
)


def results_html(variants: Sequence[Variant]) -> str:
    """Tiles, table, notes and bars for all variants."""
    found = sections([variant.labelled_results for variant in variants])
    if not found:
        return "<p>Nothing has been evaluated yet.</p>"
    tiles = "".join(_tile(section, row) for section, rows in found.items() for row in rows if row["system"] == "metadiff")
    bodies = "".join(_table_body(section, rows) for section, rows in found.items())
    bars = "".join(_bars(section, rows) for section, rows in found.items())
    presets = dict.fromkeys(row["preset"] for variant in variants for row in variant.results["rows"])
    return (
        f'<div class="tiles">{tiles}</div><div class="scroll"><table>{_HEAD}{bodies}</table></div>{_READING}{_glossary(presets)}'
        f'<h3>Accuracy of every row</h3><div class="panels">{bars}</div>'
    )


def _tile(section: Section, row: dict[str, Any]) -> str:
    preset, _, accuracy, difference, _ = cells(row)
    mean, plus_minus, interval = accuracy.partition(" ± ")
    value = f"{mean} <small>± {interval} %</small>" if plus_minus else mean
    against = "" if row_verdict(row) is Verdict.UNKNOWN else f"{minus(difference)} to class means<br>{_verdict(row, 'span')}"
    return (
        f'<div class="tile metadiff"><div class="what">{escape(preset)}, {section.way}-way {section.shot}-shot{_badge(section)}</div>'
        f'<div class="value">{value}</div><div class="difference">{against}</div></div>'
    )


def _table_body(section: Section, rows: Sequence[dict[str, Any]]) -> str:
    lines = "".join(_table_row(section, row, index > 0 and rows[index - 1]["preset"] != row["preset"]) for index, row in enumerate(rows))
    return f'<tbody><tr><th colspan="6" scope="rowgroup"><span>{escape(section.title)}</span></th></tr>{lines}</tbody>'


def _table_row(section: Section, row: dict[str, Any], new_preset: bool) -> str:
    preset, system, accuracy, difference, _ = map(escape, cells(row))
    kinds = " ".join(["metadiff"] * (system == "metadiff") + ["new"] * new_preset)
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
    return (
        f'<tr class="{kinds}"><td>{preset}</td><td>{system}{_badge(section)}</td><td class="number">{accuracy}</td>'
        f'<td class="number">{minus(difference)}</td>{_verdict(row, "td")}<td class="number">{seconds}</td></tr>'
    )


def minus(difference: str) -> str:
    """With the sign that is as wide as a plus."""
    return difference.replace("-", "\u2212")


def _badge(section: Section) -> str:
    return TUNED_ON if section.tuned_on else ""


def _verdict(row: dict[str, Any], tag: str) -> str:
    found = row_verdict(row)
    return f'<{tag} class="{found.name.lower()}">{_MARKS[found]}{found.value}</{tag}>'


def _glossary(presets: Iterable[str]) -> str:
    notes = SYSTEMS | {preset: PRESETS[preset] for preset in presets if preset in PRESETS}
    terms = "".join(f"<dt><code>{term}</code></dt><dd>{escape(note)}</dd>" for term, note in notes.items())
    return f'<details><summary>What the rows are</summary><dl class="facts">{terms}</dl></details>'


def _bars(section: Section, rows: Sequence[dict[str, Any]]) -> str:
    shown = "; ".join(" ".join(cells(row)[:3]) for row in rows)
    alt = f"Accuracy in percent with 95 % intervals. {section.title}: {shown}"
    return panel(f"{section.way}-way {section.shot}-shot, {section.classes}", accuracy_bars(rows, section.way), alt)
