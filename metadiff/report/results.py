"""Accuracies as tables: percent with 95 % intervals, beside the paired difference to the class-mean row on the same tasks."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

BASELINE = "class_mean"
DIVERGED = "diverged"
SYSTEMS = {
    "metadiff": "the trained denoiser",
    BASELINE: "cosine to the means of the support features; the baseline",
    "gda": "gradient descent on the support set, no network",
    "identity": "the preset with its network switched off",
    "untrained": "the preset with its network as initialised",
    "oracle": "the mean of all images of each class, the queries among them: what a perfect estimate of the class mean would score",
}
_CSV_KEYS = ("preset", "system", "way", "shot", "tasks", "accuracy", "ci95", "minus_class_mean", "minus_class_mean_ci95", "seconds")


class Verdict(StrEnum):
    """A system against class means, in words."""

    ABOVE = "above class means"
    LEVEL = "not distinguishable from class means"
    BELOW = "below class means"
    BASELINE = "the baseline"
    UNKNOWN = "n/a"


@dataclass(frozen=True)
class Section:
    """The rows that may be compared with one another: one data set, split, way, shot and number of tasks."""

    dataset: str
    split: str
    tuned_on: bool
    way: int
    shot: int
    tasks: int
    query: int
    seed: int

    @property
    def classes(self) -> str:
        """Which classes the tasks come from, with a warning where settings were chosen on them."""
        return f"{self.split} classes" + (" (tuned on)" if self.tuned_on else "")

    @property
    def title(self) -> str:
        """The protocol on one line."""
        tasks = f"{self.way}-way {self.shot}-shot, {self.tasks:,} tasks of {self.query} queries a class"
        return f"{self.dataset}, {self.classes}: {tasks}, seed {self.seed}"


def verdict(difference: float | None, ci95: float | None) -> Verdict:
    """Above or below only where the paired interval, `difference` +- `ci95`, lies wholly on that side of zero."""
    if difference is None or ci95 is None or not math.isfinite(difference) or not math.isfinite(ci95):
        return Verdict.UNKNOWN
    if difference - ci95 > 0:
        return Verdict.ABOVE
    return Verdict.BELOW if difference + ci95 < 0 else Verdict.LEVEL


def row_verdict(row: dict[str, Any]) -> Verdict:
    """`verdict` of a row of the results."""
    if row["system"] == BASELINE:
        return Verdict.BASELINE
    return verdict(row["minus_class_mean"], row["minus_class_mean_ci95"])


def percent(mean: float | None, ci95: float | None, signed: bool = False) -> str:
    """A fraction and its half-width in percent, `62.31 ± 0.42`; `n/a` where not measured, `diverged` where it is not finite."""
    if mean is None:
        return "n/a"
    if not math.isfinite(mean):
        return DIVERGED
    shown = f"{round(100 * mean, 2) + 0.0:{'+' if signed else ''}.2f}"  # + 0.0: never -0.00
    return f"{shown} ± {100 * ci95:.2f}" if ci95 is not None and math.isfinite(ci95) else shown


def cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """Preset, system, accuracy, difference and verdict of a row, as text."""
    accuracy = percent(row["accuracy"], row["ci95"])
    compared = row["system"] != BASELINE and accuracy != DIVERGED
    difference = percent(row["minus_class_mean"], row["minus_class_mean_ci95"], signed=True) if compared else ""
    return row["preset"], row["system"], accuracy, difference, row_verdict(row).value


def sections(results: Sequence[dict[str, Any]]) -> dict[Section, list[dict[str, Any]]]:
    """The rows of all results by what they may be compared with; within a preset the systems stand in the order of `SYSTEMS`."""
    found: dict[Section, list[dict[str, Any]]] = {}
    order = list(SYSTEMS)
    for result in results:
        protocol = result["protocol"]
        for row in sorted(result["rows"], key=lambda row: order.index(row["system"]) if row["system"] in order else len(order)):
            about = {key: protocol[key] for key in ("dataset", "split", "tuned_on", "query", "seed")}
            section = Section(way=row["way"], shot=row["shot"], tasks=row["tasks"], **about)
            found.setdefault(section, []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0].tuned_on, item[0].shot)))


def results_table(results: list[dict[str, Any]]) -> str:
    """The results of all variants as a plain-text table for the terminal, without a line break at its end."""
    if not any(result["rows"] for result in results):
        return "No results: nothing has been evaluated."
    blocks = [f"{section.title}\n{_aligned(rows)}" for section, rows in sections(results).items()]
    note = "Accuracy in % with 95 % intervals; the difference to class means is paired, task by task."
    return "\n\n".join([*blocks, note])


def _aligned(rows: list[dict[str, Any]]) -> str:
    table = [("preset", "system", "accuracy", "minus class means", "verdict"), *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def results_markdown(results: list[dict[str, Any]]) -> str:
    """The same as Markdown tables."""
    parts = []
    for section, rows in sections(results).items():
        table = [
            ("Preset", "System", "Accuracy, %", "Minus class means", "Verdict"),
            ("---", "---", "---:", "---:", "---"),
            *map(cells, rows),
        ]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]
        parts.append(f"**{section.title}**\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) or "Nothing has been evaluated.\n"


def results_csv(results: list[dict[str, Any]]) -> str:
    """The rows as they are, in fractions, with their split and verdict."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "split", "tuned_on", "query", *_CSV_KEYS, "verdict"])
    for section, rows in sections(results).items():
        about = [section.dataset, section.split, section.tuned_on, section.query]
        writer.writerows([*about, *(row[key] for key in _CSV_KEYS), row_verdict(row).value] for row in rows)
    return text.getvalue()
