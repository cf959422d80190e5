"""How long the demo takes: every stage of configs/glyphs.yaml on the engine, from nothing, beside the same in one process.

    python -m benchmarks.demo_time [key=value ...]

The last line is one JSON object: seconds of each stage in both, in all, their ratio, and the share of the six minutes that the demo may
take on two cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 360


def main(overrides: list[str]) -> int:
    """Run both in temporary folders and print their times; 1 if the demo took longer than the limit."""
    with tempfile.TemporaryDirectory() as folder:
        engine, stages = _timed(["distributed.pipeline"], Path(folder) / "engine", overrides)
        alone, in_process = _timed(["metadiff", "pipeline"], Path(folder) / "alone", overrides)
    totals = {"engine_s": round(engine, 1), "one_process_s": round(alone, 1), "engine_over_one_process": round(engine / alone, 2)}
    limits = {"limit_s": LIMIT_S, "share_of_limit": round(engine / LIMIT_S, 3)}
    print(json.dumps({"cores": os.cpu_count(), "stages_s": stages, "stages_in_one_process_s": in_process, **totals, **limits}))
    return 0 if engine <= LIMIT_S else 1


def _timed(command: list[str], folder: Path, overrides: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds of the whole command, and of each stage."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command, "configs/glyphs.yaml", f"run.dir={folder}", *overrides], check=True)
    total = time.perf_counter() - began
    manifests = sorted((json.loads(path.read_text()) for path in folder.rglob("manifest.json")), key=lambda made: made["finished"])
    return total, {made["stage"]: made["seconds"] for made in manifests}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
