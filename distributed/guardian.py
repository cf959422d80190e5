"""Nothing outlives a command, not even one that is killed: what it starts carries a mark, and a guardian waits for its end.

The guardian is this file run as a script, with nothing but the standard library.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_MARK = "METADIFF_FOLDER"
_LOOK_SECONDS = 0.2
_LONGEST = 40


@contextmanager
def environment(**defaults: str) -> Iterator[None]:
    """Set the variables that the user has not set."""
    unset = defaults.keys() - os.environ.keys()
    os.environ.update({name: defaults[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)


@contextmanager
def guarded_folder() -> Iterator[Path]:
    """A temporary folder that is removed at the end, with all processes that were started meanwhile and still run.

    They are known by a variable that they inherit, so that it does not matter who started them. The folder's path is short
    enough for Unix sockets in it, which get 107 bytes.
    """
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="metadiff-", dir=base if len(base) <= _LONGEST else "/tmp"))
    # In a session of its own, which Ctrl-C does not reach.
    guardian = subprocess.Popen([sys.executable, "-I", "-S", __file__, str(os.getpid()), str(folder)], start_new_session=True)
    outer = os.environ.get(_MARK)
    os.environ[_MARK] = str(folder)
    try:
        yield folder
    finally:
        if outer is None:
            del os.environ[_MARK]
        else:
            os.environ[_MARK] = outer
        _clean_up(folder)
        guardian.kill()
        guardian.wait()


def _clean_up(folder: Path) -> None:
    clean_looks = 0
    while clean_looks < 2:  # a process that is just being started shows no variables for a moment
        left = _marked(folder)
        for process in left:
            _kill(process)
        clean_looks = 0 if left else clean_looks + 1
        time.sleep(_LOOK_SECONDS / 2)
    shutil.rmtree(folder, ignore_errors=True)


def _marked(folder: Path) -> list[int]:
    mark = os.fsencode(f"{_MARK}={folder}")
    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if mark in _environment_of(process)]


def _environment_of(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or just gone
        return []


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def _guard(command: int, folder: Path) -> None:
    while os.getppid() == command:
        time.sleep(_LOOK_SECONDS)
    _clean_up(folder)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), Path(sys.argv[2]))
