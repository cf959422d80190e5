import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff.report import EpisodePicture, RunReport, Variant, write_report
from metadiff.report.page import page

VOID = {"meta", "img", "br", "wbr"}


class Elements(HTMLParser):
    """All elements of a page with their attributes, its text, and a check that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open and self.open[-1] == "style" else data


def variant(name: str = "stable", tuned_on: bool = False, picture: EpisodePicture | None = None, **changes: Any) -> Variant:
    numbers = {"accuracy": 0.6231, "ci95": 0.0042, "minus_class_mean": 0.0112, "minus_class_mean_ci95": 0.002, "seconds": 1.5}
    row = {"system": "metadiff", "preset": name, "way": 5, "shot": 1, "tasks": 600} | numbers | changes
    baseline = row | {"system": "class_mean", "accuracy": 0.6119, "ci95": 0.004, "minus_class_mean": None, "minus_class_mean_ci95": None}
    protocol = {"dataset": "glyphs", "split": "val" if tuned_on else "novel", "way": 5, "query": 15, "tasks": 600, "shots": [1], "seed": 3}
    results = {"protocol": protocol | {"interval": "95 %", "tuned_on": tuned_on}, "rows": [row, baseline]}
    trace = {"1": {"t": [2, 1, 0], "accuracy": [0.2, 0.4, row["accuracy"]], "loss": [1.6, 1.2, None], "class_mean_accuracy": 0.6}}
    curves = {"1": [{"iteration": 10, "loss": 1.0}, {"iteration": 20, "loss": math.nan}]}
    return Variant(name, results, trace, curves, [picture] if picture else [])


def run(*variants: Variant, **changes: Any) -> RunReport:
    parts: dict[str, Any] = {
        "name": "glyphs",
        "config": {"seed": 3, "data": {"kind": "glyphs"}, "pretrain": {"backbone": "conv4", "learning_rate": 0.125}},
        "data": {"base": {"classes": 210, "images": 12600}},
        "pretraining": [{"epoch": 1, "loss": 2.0, "val_accuracy": 0.3}, {"epoch": 2, "loss": 1.0, "val_accuracy": None}],
        "stage_seconds": {"prepare": 10.0, "pretrain": 4000.0},
        "versions": {"torch": "2.15.0"},
    }
    return RunReport(**parts | changes, variants=list(variants))


def picture(names: tuple[str, ...] = ("alpha", "beta")) -> EpisodePicture:
    """Two ways, one shot, two queries a class; one query of the first class is taken for the second."""
    images = np.arange(2 * 3 * 8 * 8 * 3).astype(np.uint8).reshape(2, 3, 8, 8, 3)
    return EpisodePicture(1, names, images[:, :1], images[:, 1:], np.array([[0, 1], [1, 1]]))


@pytest.fixture(scope="module")
def four() -> str:
    """The page of a run of four presets, the last of which diverged."""
    first = variant("stable", picture=picture())
    return page(run(first, variant("consistent", True), variant("paper"), variant("official", accuracy=math.nan)))


def test_the_page_says_what_was_run_and_how_it_went() -> None:
    text = Elements(page(run(variant()))).text
    for words in ("glyphs", "base: 210 classes, 12,600 images", "conv4", "torch 2.15.0", "learning_rate: 0.125", "1 h 07 min"):
        assert words in text
    for words in ("5-way 1-shot, 600 tasks of 15 queries a class", "62.31 ± 0.42", "+1.12 ± 0.20", "▲ above class means", "the baseline"):
        assert words in text


def test_the_page_is_one_file_with_alternative_texts_and_without_scripts(four: str) -> None:
    elements = Elements(four).found
    links = [value or "" for _, attrs in elements for key, value in attrs.items() if key in ("src", "href", "srcset", "action", "data")]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,", "#")) for link in links)
    assert {attrs.get("id") for _, attrs in elements} >= {link[1:] for link in links if link.startswith("#")}
    assert all(attrs.get("alt") for tag, attrs in elements if tag == "img")
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object"}
    assert ("html", {"lang": "en"}) in elements
    assert "url(" not in four


def test_names_are_escaped_everywhere() -> None:
    nasty = "<script>alert('x')</script>&\""
    shown = variant(nasty, picture=picture((nasty, "beta")))
    html = page(run(shown, name=nasty, config={"data": {"kind": nasty}}, versions={nasty: "1"}, stage_seconds={nasty: 1.0}))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert f"{nasty} · MetaDiff" in Elements(html).text


@pytest.mark.parametrize(
    ("difference", "ci95", "verdict"),
    [(0.01, 0.009, "above class means"), (0.25, 0.25, "not distinguishable from class means"), (-0.01, 0.009, "below class means")],
)
def test_only_an_interval_above_zero_is_called_above(difference: float, ci95: float, verdict: str) -> None:
    text = Elements(page(run(variant(minus_class_mean=difference, minus_class_mean_ci95=ci95)))).text
    # Once in the tile and once in the table; no other verdict beside it.
    assert re.findall(r"(?:above|not distinguishable from|below) class means", text) == [verdict, verdict]


def test_every_row_on_validation_classes_is_marked() -> None:
    elements = Elements(page(run(variant(tuned_on=True)))).found
    assert len([attrs for _, attrs in elements if attrs.get("class") == "badge"]) == 3
    assert "tuned on" not in Elements(page(run(variant()))).text


def test_queries_are_framed_by_right_and_wrong_with_a_second_cue() -> None:
    html = page(run(variant(picture=picture())))
    assert html.count('<figure class="query right">') == html.count("<b>✓</b>") == 3
    assert html.count('<figure class="query wrong">') == html.count("<b>✗</b>") == 1
    assert 'alt="query of alpha, taken for beta: wrong"' in html
    assert "2-way 1-shot: 3 of the 4 queries shown are right" in html


def test_pretraining_alone_has_a_page() -> None:
    bare = run(pretraining=[{"epoch": 1, "loss": 2.0}])
    text = Elements(page(bare)).text
    assert "Nothing has been evaluated yet." in text
    assert "Pretraining the backbone: loss" in text
    for absent in ("validation accuracy", "Along the denoising", "Episodes", "Training the denoiser"):
        assert absent not in text


def test_an_empty_run_has_a_page() -> None:
    assert "Resolved configuration" in Elements(page(run(config={}, data={}, pretraining=[], stage_seconds={}, versions={}))).text


def test_four_variants_are_told_apart_and_one_may_have_diverged(four: str) -> None:
    assert four.count("diverged") >= 2
    legends = re.findall(r'<div class="legend">(.*?)</div>', four)
    assert len(legends) == 2
    assert all(re.sub("<[^>]*>", "", legend) == "●stable■consistent▲paper◆official" for legend in legends)
    assert "an interval above its identity row is a gain" in four


def test_two_trainings_of_one_preset_are_told_apart(tmp_path: Path) -> None:
    second = variant("stable")
    write_report(run(second, Variant("narrow", second.results, {}, {}, [])), tmp_path)
    assert "| narrow (stable) | metadiff |" in (tmp_path / "results.md").read_text()


def test_the_same_run_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(run(variant(picture=picture())), tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["index.html", "results.csv", "results.md"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_samplers_and_uncertainty_are_sections_where_there_is_something_to_show() -> None:
    shown, trial = variant(), {"method": "ddim", "steps": 5, "evaluations": 5, "difference": 0.0, "ci95": 0.001, "passed": True}
    taken = {"taken": trial, "gated": True, "evaluations": 5, "split": "val", "tasks": 9, "margin": 0.002, "reference_accuracy": 0.5}
    measures = dict.fromkeys(("accuracy", "accuracy_ci95", "ece", "ece_ci95", "brier", "brier_ci95"), 0.1)
    row = measures | {"system": "single", "bins": [{"queries": 30, "confidence": 0.5, "accuracy": 0.5}]}
    sampled = {"members": 2, "tasks": 9, "sampler": {"method": "eq8"}, "evaluations": 10, "rows": [row]}
    more = shown.results | {"sampler": {"1": taken | {"trace": [trial]}}, "ensemble": {"1": sampled}}
    both = Elements(page(run(Variant("stable", more, {}, {}, []))))
    assert {"samplers", "uncertainty"} <= {attrs.get("id") for _, attrs in both.found}
    assert not {"samplers", "uncertainty"} & {attrs.get("id") for _, attrs in Elements(page(run(shown))).found}
