import json
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.tensorboard import tensorboard_log

pytest.importorskip("tensorboard", reason="the engine's extra is not installed")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    # In a process of its own, for the warnings that importing it gives.
    program = """if True:
        import json, sys
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(sys.argv[1]).Reload()
        print(json.dumps({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
    """
    shown = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True).stdout
    return {tag: [(step, round(value, 6)) for step, value in points] for tag, points in json.loads(shown).items()}


def test_rows_become_curves_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    log = tensorboard_log(tmp_path / "a", "epoch")
    for epoch in (1, 2, 3):
        log(epoch, {"epoch": epoch, "loss": epoch / 2, **({"val_accuracy": 0.5} if epoch == 2 else {})})
    again = tensorboard_log(tmp_path / "a", "epoch")
    for epoch in (2, 3, 4):
        again(epoch, {"epoch": epoch, "loss": float(epoch)})
    shown = curves(tmp_path / "a")
    assert shown["loss"] == [(1, 0.5), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert shown.keys() == {"loss", "val_accuracy"}


def test_nothing_is_made_before_the_first_row(tmp_path: Path) -> None:
    tensorboard_log(tmp_path / "a", "epoch")
    assert not (tmp_path / "a").exists()
