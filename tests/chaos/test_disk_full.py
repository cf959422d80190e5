"""A disk that fills up, is cleared a little, and fills up again."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.case import ARRAYS, Case, NewCase
from tests.chaos.ledger import DISK_FULL, ENOUGH, Ledger
from tests.chaos.places import Folder

pytestmark = pytest.mark.chaos

DISK_BYTES = 32 * 2**20


@pytest.fixture
def disk(tmp_path: Path, ledger: Ledger) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        ledger.skipped[DISK_FULL] = "this user may not mount a small disk"
        pytest.skip(ledger.skipped[DISK_FULL])
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("where", ["new_case", "on_cluster"])
def test_of_the_store(where: str, disk: Path, request: pytest.FixtureRequest) -> None:
    case: Case = request.getfixturevalue(where)(place=Folder(disk / "store"))
    fit = case.fit()
    shard = max(map(len, case.reference.store.values()))
    for _ in range(3):
        leave(disk, case.rng.randrange(case.left() * shard // 2))
        refused(case, fit)
        case.check_what_is_there()
    leave(disk, DISK_BYTES)
    fit.start().finish()
    case.prove()


def test_of_the_run(disk: Path, new_case: NewCase) -> None:
    """All shards are there; it is the arrays that find no room."""
    case = new_case(place=Folder(disk.parent / "store"))
    case.folder = disk
    case.fill(0)
    fit = case.fit()
    arrays = sum(len(case.reference.artifact[name]) for name in ARRAYS)
    for _ in range(ENOUGH - 6):
        leave(disk, case.rng.randrange(4096, arrays // 2))
        refused(case, fit)
    leave(disk, DISK_BYTES)
    fit.start().finish()
    case.prove()


def leave(disk: Path, num_bytes: int) -> None:
    """Fill the disk but for so many bytes, or as far as others have left room."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    if room > num_bytes:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - num_bytes)


def refused(case: Case, fit) -> None:
    fit.start().finish(code=2)
    assert "No space left on device" in fit.last_words
    case.hit(DISK_FULL)
