"""Metrics as JSON lines that a killed and resumed run continues without gaps or repetitions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metadiff.artifact import write_atomically

Log = Callable[[int, dict[str, Any]], None]
"""Takes the rows of a training, each with its epoch or iteration, to wherever else they are to be seen."""


def write_row(path: Path, index: int, row: dict[str, Any]) -> None:
    """Make `row` line `index` of the file, dropping what a killed run wrote past its last checkpoint."""
    lines = path.read_text().splitlines()[:index] if path.exists() else []
    write_atomically(path, "".join(f"{line}\n" for line in [*lines, json.dumps(row)]).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of the file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
