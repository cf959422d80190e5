import os
from pathlib import Path

import pytest

from metadiff.metrics import read_rows, write_row


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for index in range(3):
        write_row(path, index, {"epoch": index, "loss": 0.1 * index})
    assert read_rows(path) == [{"epoch": index, "loss": 0.1 * index} for index in range(3)]
    assert path.read_text().count("\n") == 3


def test_a_resumed_run_replaces_what_lies_past_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for index in range(4):
        write_row(path, index, {"epoch": index, "run": 1})
    write_row(path, 2, {"epoch": 2, "run": 2})
    assert [(row["epoch"], row["run"]) for row in read_rows(path)] == [(0, 1), (1, 1), (2, 2)]


def test_a_kill_while_writing_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write_row(path, 0, {"epoch": 0})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(os, "fsync", die)
        write_row(path, 1, {"epoch": 1})
    assert read_rows(path) == [{"epoch": 0}]
    write_row(path, 1, {"epoch": 1})
    assert read_rows(path) == [{"epoch": 0}, {"epoch": 1}]
