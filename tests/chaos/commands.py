"""The command under test, `python -m distributed.fit_targets` unless another is given, in a process of its own."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NUM_BLOCKS, BLOCK = 40, 8
SECTIONS = {
    # So many iterations and no fewer, so that a block takes its time; the last block is a smaller one.
    "targets": {"kind": "ce", "pull": 0.1, "num_tasks": NUM_BLOCKS * BLOCK - 3, "tolerance": 1e-12, "max_iterations": 80},
    "store": {"block": BLOCK},
    "ray": {"num_workers": 0, "num_actors": 0},
    "loader": {"kind": "memory"},
}

_PATIENCE_SECONDS = 300.0
_POLL_SECONDS = 0.005
_TITLE = re.compile(r"ray::Actor(\.\w+)?")


def python(*words: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` from the repository to its end."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def wait_until(happened: Callable[[], object], what: str, seconds: float = _PATIENCE_SECONDS) -> None:
    """Return as soon as it has happened."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"in vain for {seconds:.0f} s: {what}"
        time.sleep(_POLL_SECONDS)


@dataclass
class Fit:
    """A run whose targets are to be fitted, by as many starts of the same command as it takes.

    Attributes:
        folder: of the run; `run.dir` is its parent.
        words: the command line after the program.
        said: what each start wrote to stderr.
        program: the interpreter's first words.
    """

    folder: Path
    words: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    said: list[Path] = field(default_factory=list)
    program: Sequence[str] = ("-m", "distributed.fit_targets")

    def start(self) -> "Fit":
        """Start the command (once more)."""
        self.said.append(self.folder / f"stderr-{len(self.said)}")
        with self.said[-1].open("wb") as stderr:
            command = [sys.executable, *self.program, *self.words, f"run.dir={self.folder.parent}"]
            self.process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=subprocess.DEVNULL, stderr=stderr)
        return self

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self.process
        return self.process.pid

    @property
    def last_words(self) -> str:
        """All that the last start has said so far."""
        return self.said[-1].read_text(errors="replace")

    def wait_until_it_says(self, words: str) -> None:
        """Return as soon as the last start has said so, or has ended."""
        wait_until(lambda: words in self.last_words or not self.running, words)

    def kill(self) -> bool:
        """SIGKILL to the command alone; whether that, and not its own end, was the end of it."""
        assert self.process
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def finish(self, code: int = 0) -> None:
        """Wait for the end, which is to be as good as `code` says."""
        assert self.process
        ended = self.process.wait(_PATIENCE_SECONDS)
        assert ended == code, f"exit code {ended}, having said:\n{self.last_words}"
        assert "Traceback" not in self.last_words, self.last_words

    def close(self) -> None:
        """Leave nothing that runs."""
        if self.running:
            self.kill()


def descendants(ancestors: Sequence[int]) -> list[psutil.Process]:
    """All living processes under those of these numbers."""
    found: list[psutil.Process] = []
    for number in ancestors:
        try:
            found += psutil.Process(number).children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return found


def actors(ancestors: Sequence[int], at_work: bool = False) -> list[psutil.Process]:
    """The crew's actors under these processes; only those in the middle of a call, if so wanted. Ray shows it in processes' titles."""
    found = []
    for process in descendants(ancestors):
        try:
            title = _TITLE.match(" ".join(process.cmdline()))
        except psutil.Error:
            continue
        if title and (title[1] or not at_work):
            found.append(process)
    return found


def kill(process: psutil.Process) -> bool:
    """SIGKILL; whether that was the end of it."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, f"the end of {process}")
    return True
