"""What the page says about samplers that were chosen by a gate."""

from typing import Any

from metadiff.report import Variant
from metadiff.report.sampling import sampler_name, samplers_html


def trial(method: str, steps: int, difference: float, passed: bool) -> dict[str, Any]:
    return {"method": method, "steps": steps, "evaluations": steps, "difference": difference, "ci95": 0.001, "passed": passed}


def chosen(taken: dict[str, Any], gated: bool, *trials: dict[str, Any]) -> dict[str, Any]:
    common = {"split": "val", "tasks": 2000, "margin": 0.002, "reference_accuracy": 0.6231}
    return common | {"taken": taken, "gated": gated, "evaluations": taken["steps"] or 1000, "trace": list(trials)}


def variant(name: str, **sampler: dict[str, Any]) -> Variant:
    return Variant(
        name, {"protocol": {}, "rows": [], "sampler": {shot.removeprefix("s"): record for shot, record in sampler.items()}}, {}, {}, []
    )


FEW, ALL = {"method": "ddim", "steps": 20}, {"method": "eq8", "steps": None}
PASSES = chosen(FEW, True, trial("ddim", 10, -0.004, False), trial("ddim", 20, 0.0005, True))
NONE_PASSES = chosen(ALL, False, trial("ddim", 10, -0.02, False), trial("ddim", 20, -0.01, False))


def test_candidates_stand_across_presets_with_what_is_taken() -> None:
    html = samplers_html([variant("consistent", s1=PASSES), variant("stable", s1=NONE_PASSES)])
    assert html.index("consistent<br><small>1-shot, 2,000 tasks") < html.index("stable<br><small>1-shot, 2,000 tasks")
    lines = html.split("<tr")
    assert next(line for line in lines if "<td>DDIM, 10 steps</td>" in line).count("✗") == 2
    twenty = next(line for line in lines if "<td>DDIM, 20 steps</td>" in line)
    assert "\u22121.00 ± 0.10 ✗" in twenty
    assert html.count("<b>") == 2, "what is taken"
    assert "<b>+0.05 ± 0.10 ✓</b>" in twenty
    assert '<td class="number">62.31</td><td class="number"><b>62.31</b></td>' in html, "the second preset takes all steps"
    assert "val classes" in html
    assert "&minus;0.2" in html


def test_presets_may_have_tried_different_samplers() -> None:
    other = chosen(ALL, False, trial("dpmpp2m", 5, -0.01, False))
    html = samplers_html([variant("a", s5=PASSES), variant("b", s5=other)])
    places = [html.index(name) for name in ("DPM-Solver++ 2M, 5 steps", "DDIM, 10 steps", "<td>DDIM, 20 steps")]
    assert places == sorted(places), "the cheapest first"
    assert html.count('<td class="number"></td>') == 3, "what one of them did not try is left empty"


def test_without_a_gate_there_is_nothing_to_say() -> None:
    given = {"taken": ALL, "gated": False, "evaluations": 1000}
    assert samplers_html([variant("stable", s1=given), Variant("older", {"protocol": {}, "rows": []}, {}, {}, [])]) == ""


def test_names_for_people() -> None:
    assert sampler_name({"method": "eq8"}, 1) == "Eq. 8, 1 step"
    assert sampler_name({"method": "eq8_2m", "spacing": "log_snr"}, 10) == "Eq. 8, 2nd order, 10 steps in log-SNR"
    assert sampler_name({"method": "heun"}, 3) == "heun, 3 steps", "what is not known keeps its name"
