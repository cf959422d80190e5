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
_LOOK_SECONDS = 0.4
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

    They are known by a variable that they inherit, so that it does not matter who started them, and by who started them. The
    folder's path is short enough for Unix sockets in it, which get 107 bytes.
    """
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="metadiff-", dir=base if len(base) <= _LONGEST else "/tmp"))
    # In a session of its own, which Ctrl-C does not reach.
    script = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(folder)]
    guardian = subprocess.Popen(script, start_new_session=True, stdout=subprocess.PIPE)
    assert guardian.stdout
    with guardian.stdout as ready:
        ready.readline()
    outer = os.environ.get(_MARK)
    os.environ[_MARK] = str(folder)
    try:
        yield folder
    finally:
        if outer is None:
            del os.environ[_MARK]
        else:
            os.environ[_MARK] = outer
        guardian.terminate()
        guardian.wait()


class _Crowd:
    """The processes that carry a folder's mark, and whatever these have started: some of Ray's write over their variables."""

    def __init__(self, folder: Path) -> None:
        self.mark = os.fsencode(f"{_MARK}={folder}")
        self.members: dict[int, str] = {}
        """When each started: numbers are used again."""

    def look(self) -> None:
        """Forget who has gone, and find who is new."""
        alive = dict(filter(None, map(_born, Path("/proc").glob("[0-9]*"))))
        self.members = {process: start for process, start in self.members.items() if alive.get(process, ("",))[0] == start}
        marked = {process for process in alive.keys() - self.members.keys() if self.mark in _environment_of(process)}
        while new := marked | {process for process, (_, parent) in alive.items() if parent in self.members} - self.members.keys():
            self.members |= {process: alive[process][0] for process in new}
            marked = set()

    def kill(self) -> None:
        """End them all, and those that they are just starting, which show no variables for a moment."""
        quiet_looks = 0
        while quiet_looks < 2:
            self.look()
            quiet_looks = 0 if self.members else quiet_looks + 1
            for process in self.members:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS / 4)


def _born(process: Path) -> tuple[int, tuple[str, int]] | None:
    """A living process's number, when it started, and its parent."""
    try:
        fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else (int(process.name), (fields[19], int(fields[1])))


def _environment_of(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or just gone
        return []


def _guard(command: int, folder: Path) -> None:
    dismissed: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: dismissed.append(number))
    print("ready", flush=True)
    crowd = _Crowd(folder)
    while os.getppid() == command and not dismissed:
        crowd.look()
        time.sleep(_LOOK_SECONDS)
    crowd.kill()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), Path(sys.argv[2]))
