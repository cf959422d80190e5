"""How long the demo takes: every stage of configs/glyphs.yaml from nothing, beside the five minutes that it may take on two cores.

    python -m benchmarks.demo_time [key=value ...]

The last line is one JSON object: seconds of each stage, in all, and their share of the limit.
"""

import json
import os
import sys
import tempfile
import time

from metadiff.pipeline import load_config, run_stages
from metadiff.stages import STAGES

LIMIT_S = 300


def main(overrides: list[str]) -> int:
    """Run the demo in a temporary folder and print its times; 1 if it took longer than the limit."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = run_stages(load_config("configs/glyphs.yaml", [f"run.dir={folder}", *overrides]), STAGES, list(STAGES)[-1])
        total = time.perf_counter() - began
        stages = {name: made.manifest["seconds"] for name, made in run.artifacts.items()}
    share = {"total_s": round(total, 1), "limit_s": LIMIT_S, "share_of_limit": round(total / LIMIT_S, 3)}
    print(json.dumps({"cores": os.cpu_count(), "stages_s": stages, **share}))
    return 0 if total <= LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
