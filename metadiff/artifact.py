"""Artifacts: a stage's folder with its payload and a manifest, committed whole or not at all.

A stage works in `<artifact>.partial`, which survives a kill so that the stage can resume, and becomes the
artifact by one rename after the manifest is written. What has no manifest is never mistaken for finished.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from metadiff.errors import UserError

MANIFEST = "manifest.json"
IDENTITY = "identity.json"
_verified: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Artifact:
    """A finished, verified artifact.

    Attributes:
        path: its folder.
        manifest: stage, resolved config, hashes of inputs and files, versions, wall time.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def content(self) -> str:
        """The hash of all files: what later stages record as their input."""
        return self.manifest["content"]

    def file(self, name: str) -> Path:
        """Path of one file of the payload.

        Raises:
            UserError: the manifest does not list it.
        """
        if name not in self.manifest["files"]:
            raise UserError(f"artifact {self.path}: has no {name}; it holds {', '.join(sorted(self.manifest['files']))}")
        return self.path / name


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex digest of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def exists(path: Path) -> bool:
    """Whether a finished artifact (whole or damaged) lies at `path`."""
    return (path / MANIFEST).is_file()


def read(path: Path) -> Artifact:
    """The artifact at `path`, every file checked against the manifest's sizes and checksums.

    Raises:
        UserError: it is missing, unfinished, edited or damaged.
    """
    manifest = _read_manifest(path)
    if (str(path), manifest["checksum"]) not in _verified:
        for name, expected in manifest["files"].items():
            _verify_file(path, name, expected)
        _verified.add((str(path), manifest["checksum"]))
    return Artifact(path, manifest)


def partial_path(path: Path) -> Path:
    """Where the artifact of `path` is built."""
    return path.with_name(path.name + ".partial")


def workspace(path: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> Path:
    """The folder to build the artifact of `path` in: an earlier, killed attempt at the very same work, or an empty one."""
    partial = partial_path(path)
    identity = digest({"stage": stage, "config": config, "inputs": inputs})
    marker = partial / IDENTITY
    if not marker.is_file() or marker.read_text() != identity:
        # First of all, so that a half-emptied folder is never taken for the work that it held.
        marker.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_atomically(marker, identity.encode())
    return partial


def commit(partial: Path, path: Path, stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], seconds: float) -> Artifact:
    """Turn a finished workspace into the artifact at `path`, replacing an older one."""
    for half_written in partial.rglob("*.tmp"):
        half_written.unlink()
    payload = (file for file in partial.rglob("*") if file.is_file() and file.name not in (IDENTITY, MANIFEST))
    names = sorted(str(file.relative_to(partial)) for file in payload)
    files = {name: {"sha256": sha256(partial / name), "bytes": (partial / name).stat().st_size} for name in names}
    manifest = {
        "stage": stage,
        "config": dict(config),
        "inputs": dict(inputs),
        "files": files,
        "content": digest(files),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")},
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    manifest["checksum"] = digest(manifest)
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1).encode())
    stale = path.with_name(path.name + ".stale")
    shutil.rmtree(stale, ignore_errors=True)
    if path.exists():
        path.rename(stale)
    partial.rename(path)
    shutil.rmtree(stale, ignore_errors=True)
    return read(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or the survivor of a crash, sees all of it or the old one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        # What is left of it may hold the last room on the disk.
        temporary.unlink(missing_ok=True)
        raise


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        checksum = digest({key: value for key, value in manifest.items() if key != "checksum"})
        intact = manifest["checksum"] == checksum
    except FileNotFoundError:
        raise UserError(f"artifact {path}: not there or not finished (no {MANIFEST}); run the stage that makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact, manifest = False, {}
    if not intact:
        raise UserError(f"artifact {path}: {MANIFEST} was edited or is damaged; redo the stage with --force")
    return manifest


def _verify_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    file = path / name
    if not file.is_file():
        raise UserError(f"artifact {path}: {name} is missing; redo the stage with --force")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"artifact {path}: {name} has {size} bytes, the manifest says {expected['bytes']}; redo the stage with --force")
    if sha256(file) != expected["sha256"]:
        raise UserError(f"artifact {path}: the content of {name} does not match its checksum; redo the stage with --force")
