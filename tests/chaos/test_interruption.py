"""A pipeline that is interrupted or killed in every stage, one after the other, and started again each time: nothing lost, the same end.

Minutes long: `make chaos`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from distributed.pipeline import STAGES, main
from tests.tiny import write_config

ROOT = Path(__file__).parents[2]
SECTIONS = {"targets": {"kind": "ce", "pull": 0.1, "num_tasks": 400}, "store": {"block": 16}, "ray": {"num_workers": 2, "num_actors": 2}}
LONGER = {"train": {"iterations": 400, "batch_size": 4, "ema_decay": 0.9, "ema_start": 10, "checkpoint_every": 50}}

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pipeline comes to if it is left alone."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([str(write_config(folder, **SECTIONS, **LONGER))]) == 0
    return folder / "runs/tiny"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_in_every_stage(number: signal.Signals, uninterrupted: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, **SECTIONS, **LONGER)
    run = tmp_path / "runs/tiny"
    for stage in STAGES:
        process = start(config)
        partial = run / (f"{stage}/stable.partial" if STAGES[stage].variant else f"{stage}.partial")
        while not partial.exists() and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is None and stage in ("embed", "fit_targets", "train", "evaluate"):
            time.sleep(4.0)  # into the midst of Ray's start or of the work
        begun = descendants(process)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)  # the terminal interrupts all
        _, said = process.communicate(timeout=60)
        expected = {signal.SIGINT: 130, signal.SIGTERM: 130, signal.SIGKILL: -9}[number]
        assert process.returncode == expected or "report: done" in said, said
        assert "Traceback" not in said, said
        _, left = psutil.wait_procs(begun, timeout=20)
        assert not left, f"{stage}: {left} outlived the command"
    process = start(config)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for name in ("pretrain/backbone.safetensors", "fit_targets/stable/targets.npy", "train/stable/1shot.safetensors"):
        assert (run / name).read_bytes() == (uninterrupted / name).read_bytes(), f"{name}: the same as never interrupted"
    assert rows(run) == rows(uninterrupted)


def start(config: Path) -> subprocess.Popen:
    program = [sys.executable, "-m", "distributed.pipeline", str(config)]
    return subprocess.Popen(
        program,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def rows(run: Path) -> list[dict]:
    results = json.loads((run / "evaluate/stable/results.json").read_text())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in results["rows"]]
