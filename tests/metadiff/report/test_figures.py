import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from metadiff.report.figures import Curve, accuracy_bars, line_panel, panel, reliability_panel

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def row(system: str, preset: str = "stable", accuracy: float | None = 0.5, ci95: float | None = 0.01) -> dict[str, Any]:
    return {"system": system, "preset": preset, "accuracy": accuracy, "ci95": ci95}


def coordinates(path: str) -> np.ndarray:
    return np.array([[float(number) for number in pair] for pair in re.findall(r"[ML] (\S+) (\S+)", path)])


def curve_of(svg: str, colour: str, number: int = 0) -> np.ndarray:
    """The points of the first line in `colour`, or another one, in the image's coordinates."""
    styled = [(path.get("style", ""), path.get("d", "")) for path in ElementTree.fromstring(svg).iter(f"{SVG}path")]
    return [coordinates(d) for style, d in styled if "fill: none" in style and colour in style][number]


def test_time_runs_from_noise_at_the_left_when_descending() -> None:
    x = curve_of(line_panel([Curve([1000, 500, 0], [0.2, 0.3, 0.9])], "t", "accuracy", descending=True), "#0072b2")[:, 0]
    assert (np.diff(x) > 0).all()


def test_a_wide_range_of_losses_is_drawn_on_a_logarithmic_axis() -> None:
    y = curve_of(line_panel([Curve([1, 2, 3], [1.0, 0.1, 0.01])], "iteration", "loss"), "#0072b2")[:, 1]
    assert y[1] == pytest.approx((y[0] + y[2]) / 2, abs=0.01)


def test_fractions_are_drawn_in_percent() -> None:
    assert {"20", "80"} <= {*texts(line_panel([Curve([1, 2], [0.2, 0.8])], "epoch", "accuracy, %", percents=True))}


def test_gaps_stay_gaps() -> None:
    svg = line_panel([Curve([1, 2, 3, 4, 5], [1.0, 2.0, None, float("inf"), 3.0], level=float("nan"))], "x", "y")
    assert len(curve_of(svg, "#0072b2")) == 3


@pytest.mark.parametrize("y", [[], [None], [float("nan"), float("inf")]])
def test_nothing_finite_is_said_so(y: list[float | None]) -> None:
    assert "diverged: no finite value" in texts(line_panel([Curve(range(len(y)), y)], "x", "y"))


def test_bars_carry_their_values() -> None:
    rows = [row("metadiff"), row("class_mean", accuracy=None, ci95=None), row("oracle", accuracy=float("nan")), row("gda", ci95=None)]
    shown = texts(accuracy_bars(rows, 5))
    assert {"stable", "metadiff", "50.00 ± 1.00", "n/a", "diverged", "50.00", "chance"} <= {*shown}


def test_a_bar_is_as_long_as_its_accuracy_and_chance_stands_at_one_in_n() -> None:
    root = ElementTree.fromstring(accuracy_bars([row("metadiff", accuracy=0.8), row("class_mean", accuracy=0.4)], 4))
    styled = {path.get("style", ""): coordinates(path.get("d", ""))[:, 0] for path in root.iter(f"{SVG}path")}
    blue, grey = (next(x for style, x in styled.items() if style.startswith(f"fill: {colour}")) for colour in ("#0072b2", "#52606d"))
    chance = next(x for style, x in styled.items() if "stroke-dasharray" in style)
    assert np.ptp(blue) == pytest.approx(2 * np.ptp(grey), abs=0.01)
    assert chance[0] - blue.min() == pytest.approx(np.ptp(blue) * 0.25 / 0.8, abs=0.01)


def test_names_in_any_script_and_with_dollars_are_drawn_as_they_are() -> None:
    assert {"学習 $a$ <b>"} <= {*texts(accuracy_bars([row("metadiff", preset="学習 $a$ <b>")], 5))}


def test_the_same_figure_is_the_same_bytes_without_a_date() -> None:
    first, second = (line_panel([Curve([1, 2], [0.2, 0.8], level=0.5)], "x", "y") for _ in range(2))
    assert first == second
    assert "<metadata>" not in first


def test_a_panel_escapes_its_words() -> None:
    html = panel("a < b", "<svg/>", 'says "c" & d')
    assert "<figcaption>a &lt; b</figcaption>" in html
    assert 'alt="says &quot;c&quot; &amp; d"' in html


def bins(*filled: tuple[int, float, float]) -> list[dict[str, Any]]:
    """The first bins of four; the rest are empty."""
    empty = {"queries": 0, "confidence": None, "accuracy": None}
    return [{"queries": n, "confidence": c, "accuracy": a} for n, c, a in filled] + [empty] * (4 - len(filled))


def test_reliability_lies_on_the_diagonal_where_confidence_is_accuracy() -> None:
    truthful = {"system": "ensemble", "bins": bins((100, 0.2, 0.2), (100, 0.4, 0.4), (100, 0.6, 0.6))}
    boastful = {"system": "single", "bins": bins((100, 0.2, 0.1), (100, 0.4, 0.3), (100, 0.6, 0.5))}
    svg = reliability_panel([truthful, boastful])
    ours, theirs = curve_of(svg, "#0072b2"), curve_of(svg, "#d55e00")
    diagonal = curve_of(svg, "#5f6b7a")
    (x_0, y_0), (x_1, y_1) = diagonal
    assert ours[:, 1] == pytest.approx(y_0 + (ours[:, 0] - x_0) * (y_1 - y_0) / (x_1 - x_0), abs=0.01)
    assert (theirs[:, 1] > ours[:, 1]).all(), "less accurate is further down"
    assert {"many weights", "one weight", "confidence, %", "accuracy, %", "queries, %"} <= {*texts(svg)}


def test_reliability_leaves_out_bins_that_say_little() -> None:
    shown = reliability_panel([{"system": "class_mean", "bins": bins((500, 0.2, 0.2), (19, 0.4, 0.9), (0, 0.0, 0.0), (500, 0.9, 0.8))}])
    assert len(curve_of(shown, "#52606d")) == 2


def test_the_strip_shows_shares_of_queries() -> None:
    few, many = ({"system": name, "bins": bins((n, 0.2, 0.2), (3 * n, 0.4, 0.4))} for name, n in (("ensemble", 30), ("single", 3000)))
    svg = reliability_panel([few, many])
    strips = [curve_of(svg, colour, -1) for colour in ("#0072b2", "#d55e00")]
    assert strips[0] == pytest.approx(strips[1])
    heights = sorted({float(y) for y in strips[0][:, 1]})
    assert (heights[2] - heights[0]) == pytest.approx(3 * (heights[2] - heights[1])), "three quarters and one, from the ground up"
