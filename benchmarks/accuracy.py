"""The accuracy gate: every preset on real tasks, beside class means, with intervals that decide.

    python -m benchmarks.accuracy [--data FOLDER] [glyphs] [mini_imagenet_conv4] [key=value ...]

For `stable` and `consistent` the paired 95 % interval of `metadiff` minus `class_mean` must lie above -1 point at every number of shots,
and `stable` must beat `untrained` with separated intervals, unless that one passes the same mark itself. `paper` and `official` are shown
beside them, and not expected to.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from metadiff.errors import UserError
from metadiff.pipeline import Run, load_config, run_stages
from metadiff.report import results_table
from metadiff.stages import STAGES

GATED = {"stable": 2000, "consistent": 2000}
SHOWN = {"paper": 300, "official": 300}
"""Tasks scored for each preset."""
FLOOR = -0.01
_FILES = {"mini_imagenet_conv4": "mini-imagenet-trainval.zip", "omniglot": "."}
WHY_NOT = (
    "paper and official: the text as printed and the authors' code. Their gradient has the gain 2/N or 2K where only a gain near 1 leaves\n"
    "a correction that the network can make, and their features are raw, so the support means drown the noise to be predicted:\n"
    "docs/paper_map.md, 'Scale'. They are trained as briefly as the others here, not for the paper's 300,000 iterations."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the gate; 0 if it holds, 1 if it does not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("METADIFF_DATA", "../shared/data")), help="folder with the data sets' zips"
    )
    parser.add_argument("what", nargs="*", default=[], help="data sets, and overrides for all of them")
    options = parser.parse_args(arguments)
    overrides = [word for word in options.what if "=" in word]
    names = [word for word in options.what if "=" not in word] or ["glyphs", "mini_imagenet_conv4"]
    try:
        failures = [failure for name in names for failure in _gate(name, options.data, overrides)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(WHY_NOT)
    print("\n".join(failures) if failures else "accuracy gate: passed")
    return 1 if failures else 0


def _gate(name: str, data: Path, overrides: list[str]) -> list[str]:
    found = [f"data.root={data / _FILES[name]}"] if name in _FILES else []
    results = {preset: _results(run_preset(name, preset, tasks, [*found, *overrides])) for preset, tasks in (GATED | SHOWN).items()}
    print(f"\n{results_table(list(results.values()))}\n")
    print("\n".join(remarks(name, results["stable"]["rows"])), flush=True)
    return [f"accuracy gate: FAILED on {name}: {failure}" for preset in GATED for failure in verdicts(preset, results[preset]["rows"])]


def run_preset(name: str, preset: str, num_tasks: int, overrides: list[str]) -> Run:
    """All stages of one preset, sharing images, backbone and features with the others."""
    scored = [f"denoiser.preset={preset}", f"run.variant={preset}-{num_tasks}-tasks", f"evaluate.num_tasks={num_tasks}"]
    settings = load_config(f"configs/{name}.yaml", [*scored, *overrides])
    return run_stages(settings, STAGES, "report")


def verdicts(preset: str, rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold, one sentence each."""
    failures = []
    for shot in sorted({row["shot"] for row in rows}):
        ours, untrained = (_row(rows, system, shot) for system in ("metadiff", "untrained"))
        if not _begins(ours) > FLOOR:
            expected = f"above {100 * FLOOR:+.0f} expected"
            failures.append(f"{preset} {shot}-shot minus class_mean: the interval begins at {100 * _begins(ours):+.2f} points, {expected}")
        separated = ours["accuracy"] - ours["ci95"] > untrained["accuracy"] + untrained["ci95"]
        if preset == "stable" and not separated and not _nothing_to_beat(untrained):
            failures.append(f"{preset} {shot}-shot does not beat the untrained network with separated intervals")
    return failures


def remarks(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Where beating the untrained network means nothing, because that one lies on the class means itself."""
    untrained = [row for row in rows if row["system"] == "untrained" and _nothing_to_beat(row)]
    return [
        f"{name} {row['preset']} {row['shot']}-shot: nothing to beat: untrained minus class_mean is "
        f"{100 * row['minus_class_mean']:+.2f} +- {100 * row['minus_class_mean_ci95']:.2f}; with gain 1 the raw gradient does the work"
        for row in untrained
    ]


def _nothing_to_beat(untrained: dict[str, Any]) -> bool:
    """With gain 1, eps_hat = g + (1 - s) u tau: a random network disturbs g little, and g alone ends at the class means."""
    return _begins(untrained) > FLOOR


def _begins(row: dict[str, Any]) -> float:
    return row["minus_class_mean"] - row["minus_class_mean_ci95"]


def _row(rows: list[dict[str, Any]], system: str, shot: int) -> dict[str, Any]:
    return next(row for row in rows if (row["system"], row["shot"]) == (system, shot))


def _results(run: Run) -> dict[str, Any]:
    return json.loads(run.artifacts["evaluate"].file("results.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
