import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed.guardian import environment, guarded_folder

ROOT = Path(__file__).parents[2]
SLEEPER = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
COMMAND = f"""
import subprocess, sys, time
from distributed.guardian import guarded_folder
with guarded_folder() as folder:
    print(folder, subprocess.Popen({SLEEPER!r}, start_new_session=True).pid, flush=True)
    time.sleep(60)
"""


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process: int, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while (runs(process) or folder.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(process)
    assert not folder.exists()


def test_variables_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIFF_A", "mine")
    monkeypatch.delenv("METADIFF_B", raising=False)
    with environment(METADIFF_A="other", METADIFF_B="other"):
        assert (os.environ["METADIFF_A"], os.environ["METADIFF_B"]) == ("mine", "other")
    assert os.environ["METADIFF_A"] == "mine"
    assert "METADIFF_B" not in os.environ


def test_at_the_end_folder_and_processes_are_gone_and_others_live() -> None:
    with subprocess.Popen(SLEEPER) as before:
        with guarded_folder() as folder:
            (folder / "file").touch()
            inside = subprocess.Popen(SLEEPER, start_new_session=True)
        assert not folder.exists()
        assert inside.wait(timeout=10) == -signal.SIGKILL
        assert before.poll() is None
        before.kill()


def test_a_process_that_erases_its_variables_is_found_by_its_parent() -> None:
    """As Ray's agents do, when they set their title."""
    erased = (
        f"import subprocess, time; print(subprocess.Popen({SLEEPER!r}, env={{}}, start_new_session=True).pid, flush=True); time.sleep(60)"
    )
    with guarded_folder():
        parent = subprocess.Popen([sys.executable, "-I", "-S", "-c", erased], stdout=subprocess.PIPE, text=True)
        assert parent.stdout
        child = int(parent.stdout.readline())
        time.sleep(1)  # the guardian looks about twice a second
        parent.kill()
        parent.wait()
        parent.stdout.close()
        assert runs(child)
    assert not runs(child)


def test_a_folder_too_deep_for_sockets_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (deep := tmp_path / ("x" * 60)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with guarded_folder() as folder:
        assert folder.parent == Path("/tmp")


def test_a_command_within_a_command_has_its_own_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METADIFF_FOLDER", "/tmp/outer")
    with guarded_folder() as folder:
        assert os.environ["METADIFF_FOLDER"] == str(folder)
    assert os.environ["METADIFF_FOLDER"] == "/tmp/outer"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_leaves_nothing(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND], cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as command:
        assert command.stdout
        folder, process = command.stdout.readline().split()
        assert runs(int(process))
        os.killpg(command.pid, number)
        command.wait(timeout=30)
    wait_until_gone(int(process), Path(folder))
