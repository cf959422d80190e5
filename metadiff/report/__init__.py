"""The report of a run: one self-contained HTML page, and its results as text, Markdown and CSV."""

from pathlib import Path

from metadiff.report.content import EpisodePicture, RunReport, Variant
from metadiff.report.page import page
from metadiff.report.results import results_csv, results_markdown, results_table
from metadiff.report.uncertainty import uncertainty_markdown

__all__ = ["EpisodePicture", "RunReport", "Variant", "results_table", "write_report"]


def write_report(run: RunReport, folder: Path) -> None:
    """Leave `index.html`, `results.md` and `results.csv` in `folder`, made if missing; the same run gives the same bytes."""
    results = [variant.labelled_results for variant in run.variants]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.html").write_text(page(run), encoding="utf-8")
    (folder / "results.md").write_text(results_markdown(results) + uncertainty_markdown(run.variants), encoding="utf-8")
    (folder / "results.csv").write_text(results_csv(results), encoding="utf-8")
