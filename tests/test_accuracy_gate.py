"""The accuracy gate's verdicts: each condition can fail, and on the right side of its mark does not."""

from typing import Any

from benchmarks.accuracy import remarks, verdicts


def rows(ours: float, untrained: float, ci95: float = 0.004) -> list[dict[str, Any]]:
    """One shot, with class means at 0.6; `ours` and `untrained` are differences to them, paired intervals a tenth of the others."""
    return [
        {
            "system": system,
            "preset": "stable",
            "shot": 1,
            "accuracy": 0.6 + difference,
            "ci95": ci95,
            "minus_class_mean": difference,
            "minus_class_mean_ci95": ci95 / 10,
        }
        for system, difference in (("metadiff", ours), ("untrained", untrained))
    ]


def test_passes_on_class_means_above_a_broken_network() -> None:
    assert not verdicts("stable", rows(0.0, -0.3))


def test_fails_below_the_floor_by_the_interval_not_the_mean() -> None:
    assert not verdicts("consistent", rows(-0.0095, -0.3))
    (failure,) = verdicts("consistent", rows(-0.0097, -0.3))
    assert "-1.01 points" in failure


def test_fails_where_the_untrained_network_is_worse_but_not_separated() -> None:
    (failure,) = verdicts("stable", rows(-0.005, -0.012))
    assert "untrained" in failure
    assert not verdicts("consistent", rows(-0.005, -0.012)), "that is asked of `stable` alone"


def test_nothing_to_beat_is_said_not_failed() -> None:
    assert not verdicts("stable", rows(0.0, -0.001))
    assert "nothing to beat" in remarks("glyphs", rows(0.0, -0.001))[0]
    assert not remarks("glyphs", rows(0.0, -0.3))
