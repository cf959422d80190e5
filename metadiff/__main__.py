"""The command line: `python -m metadiff STAGE CONFIG [key=value ...] [--dry-run] [--force]`."""

import argparse
import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

import yaml

from metadiff import preflight
from metadiff.config import dump
from metadiff.errors import UserError
from metadiff.pipeline import Run, load_config, needed, plan, run_stages, say
from metadiff.reporting import final_words
from metadiff.stages import STAGES

_DISK_TROUBLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some, or set run.dir to another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set run.dir to a folder that you may write to"),
}
_EPILOG = f"""stages, in order: {", ".join(STAGES)}; `pipeline` is all of them.
A stage builds what it needs first and skips what is done. Exit codes: 0 done, 2 bad input, 130 interrupted (start again to resume)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_intermixed_args(arguments)
        return _run(options)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        return _fail(f"{error.filename or 'writing'}: {error.strerror}; {_DISK_TROUBLE[error.errno]}")
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130


def _run(options: argparse.Namespace) -> int:
    settings = load_config(options.config, options.overrides)
    until = list(STAGES)[-1] if options.stage == "pipeline" else options.stage
    if options.dry_run:
        print(yaml.safe_dump(dump(settings), sort_keys=False, allow_unicode=True), end="")
        for line in plan(settings, STAGES, until, _forced(options, until)):
            say(line)
        return 0
    forced = _forced(options, until)
    preflight.check(settings, needed(STAGES, until), forced)
    run: Run = run_stages(settings, STAGES, until, forced)
    if options.stage == "pipeline":
        print(final_words(run))
    return 0


def _forced(options: argparse.Namespace, until: str) -> frozenset[str]:
    if not options.force:
        return frozenset()
    return frozenset(STAGES if options.stage == "pipeline" else [until])


def _fail(message: str) -> int:
    say(f"error: {' '.join(message.split())}")
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("python -m metadiff", description="MetaDiff in one process.", epilog=_EPILOG)
    parser.add_argument("stage", choices=["pipeline", *STAGES], help="how far to go")
    parser.add_argument("config", help="a YAML file, such as configs/glyphs.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.iterations=500 denoiser.preset=official")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, and what would run, and stop")
    parser.add_argument("--force", action="store_true", help="redo the stage (all of them for `pipeline`), replacing what is there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
