"""An attempt at a training in Ray Train's workers: the files by which its processes know of each other."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metadiff.artifact import write_atomically
from metadiff.errors import UserError

_RELEASE_SECONDS = 5.0


class Attempt:
    """The files by which a driver and its ranks know of each other.

    A newer driver removes them: ranks that outlived an older one (Ray's controller starts them again, if need be) find themselves unwanted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage, self.said = folder, folder / "ray", folder / "stderr"
        self.begun, self.finished, self._error = folder / "begun", folder / "finished", folder / "error.json"
        self._claim = folder / "claim"

    @property
    def wanted(self) -> bool:
        """Whether ranks are to work, rather than to end at once: not superseded, not failed for good."""
        return self.said.exists() and not self._error.exists()

    def claim(self, run_id: str) -> None:
        """Keep by what name Ray's bookkeeping of the cluster's room knows this attempt."""
        self._claim.write_text(run_id)

    def fail(self, error: UserError | OSError) -> None:
        """Tell the driver what the user should know."""
        words = {"message": str(error)}
        if isinstance(error, OSError):
            words = {"errno": error.errno, "strerror": error.strerror, "filename": error.filename}
        write_atomically(self._error, json.dumps(words, default=os.fspath).encode())

    @property
    def failure(self) -> UserError | OSError | None:
        """What a rank told by `fail`."""
        if not self._error.exists():
            return None
        words = json.loads(self._error.read_text())
        return UserError(words["message"]) if "message" in words else OSError(words["errno"], words["strerror"], words["filename"])


@contextmanager
def begin(folder: Path) -> Iterator[Attempt]:
    """A new attempt, the only one in `folder`; nothing is left of it at the end."""
    _clear(folder)
    attempt = Attempt(folder / secrets.token_hex(4))
    attempt.storage.mkdir(parents=True)
    attempt.said.touch()
    try:
        yield attempt
    finally:
        _clear(folder)


def _clear(folder: Path) -> None:
    for claim in folder.glob("*/claim"):
        _release(claim.read_text())
    shutil.rmtree(folder, ignore_errors=True)


def _release(run_id: str) -> None:
    """Make Ray forget that a training which has ended, or was killed, wants room; it would keep it for minutes, even from the next."""
    import ray
    import ray.exceptions

    if not ray.is_initialized():
        return
    with suppress(ValueError, ray.exceptions.RayError):
        claims: Any = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(claims.cancel_request.remote(f"train-{run_id}"), timeout=_RELEASE_SECONDS)
