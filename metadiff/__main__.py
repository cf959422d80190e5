"""The command line: `python -m metadiff STAGE CONFIG [key=value ...] [--dry-run] [--force]`."""

import sys
from collections.abc import Sequence

from metadiff import command, preflight
from metadiff.pipeline import load_config
from metadiff.stages import STAGES

PROGRAM = command.Program("python -m metadiff", "MetaDiff in one process.", STAGES, load_config, preflight.check)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return command.run(PROGRAM, arguments)


if __name__ == "__main__":
    sys.exit(main())
