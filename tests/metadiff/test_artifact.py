import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadiff import artifact
from metadiff.artifact import IDENTITY, MANIFEST, Artifact, commit, digest, exists, read, sha256, workspace, write_atomically
from metadiff.errors import UserError

CONFIG, INPUTS = {"seed": 0, "prepare": {"image_size": 16}}, {"prepare": "0" * 64}
STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Killed(BaseException):
    """Like a signal: no code of ours catches it."""


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been verified yet."""
    monkeypatch.setattr(artifact, "_verified", set())


def write_payload(folder: Path, version: int = 1) -> None:
    (folder / "deep").mkdir(exist_ok=True)
    write_atomically(folder / "weights.bin", bytes([version]) * 100)
    write_atomically(folder / "deep" / "rows.jsonl", b"{}\n")
    np.save(folder / "labels.npy", np.arange(5) + version)


def build(path: Path, version: int = 1, config: dict[str, Any] = CONFIG) -> Artifact:
    partial = workspace(path, "embed", config, INPUTS)
    write_payload(partial, version)
    return commit(partial, path, "embed", config, INPUTS, 1.23456)


def kill_at(patch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Die before the given file operation of the process; returns how many there were."""
    count = 0

    def counted(step: str) -> Callable[..., Any]:
        original = getattr(os, step)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == number:
                raise Killed
            count += 1
            return original(*args, **kwargs)

        return call

    for step in STEPS:
        patch.setattr(os, step, counted(step))
    return lambda: count


def kills(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object], restore: Callable[[], object]) -> Iterator[int]:
    """Do `restore`, then `work` killed before its n-th file operation, for n = 0, 1, ... until it is done unhurt."""
    for number in range(100):
        restore()
        with monkeypatch.context() as patch:
            done = kill_at(patch, number)
            try:
                work()
            except Killed:
                pass
            else:
                assert done() == number >= 3
                return
        artifact._verified.clear()
        yield number
    raise AssertionError("never done")


def refusal(path: Path) -> str:
    """The one line with which the artifact is refused."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"artifact {path}: ")
    return message


def test_manifest_tells_everything(tmp_path: Path) -> None:
    done = build(tmp_path / "runs" / "x" / "embed")
    manifest = json.loads((done.path / MANIFEST).read_text())
    assert manifest == done.manifest
    assert {key: manifest[key] for key in ("stage", "config", "inputs", "seconds")} == {
        "stage": "embed",
        "config": CONFIG,
        "inputs": INPUTS,
        "seconds": 1.235,
    }
    assert sorted(manifest["files"]) == ["deep/rows.jsonl", "labels.npy", "weights.bin"]
    assert manifest["files"]["weights.bin"] == {"sha256": sha256(done.file("weights.bin")), "bytes": 100}
    assert set(manifest["versions"]) == {"python", "torch", "torchvision", "numpy"}
    assert not done.path.with_name("embed.partial").exists()


def test_content_depends_on_the_files_alone(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a"), build(tmp_path / "b", config={"seed": 1})
    assert first.content == second.content
    assert build(tmp_path / "c", version=2).content != first.content


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_an_unlisted_file_is_no_payload(tmp_path: Path) -> None:
    done = build(tmp_path / "embed")
    with pytest.raises(UserError, match=r"has no bank.npy; it holds deep/rows.jsonl, labels.npy, weights.bin"):
        done.file("bank.npy")


def damage(path: Path, how: str) -> None:
    file = path / "weights.bin"
    content = bytearray(file.read_bytes())
    match how:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(content[:-1])
        case "longer":
            file.write_bytes(content + b"x")
        case "flipped":
            content[50] ^= 1
            file.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "weights.bin is missing"),
        ("truncated", "weights.bin has 99 bytes, the manifest says 100"),
        ("longer", "weights.bin has 101 bytes, the manifest says 100"),
        ("flipped", "the content of weights.bin does not match its checksum"),
    ],
)
def test_damaged_file_is_refused_until_redone(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "embed"
    build(path)
    artifact._verified.clear()
    damage(path, how)
    assert message in refusal(path)
    assert "--force" in refusal(path)
    assert exists(path)
    build(path)
    assert read(path).file("weights.bin").read_bytes() == b"\1" * 100


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"bytes": 100', '"bytes": 99'),
        lambda text: text.replace('"finished"', '"started"'),
        lambda text: text.replace('"checksum"', '"check"'),
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "3",
    ],
)
def test_edited_manifest_is_refused(tmp_path: Path, edit: Callable[[str], str]) -> None:
    path = tmp_path / "embed"
    build(path)
    text = (path / MANIFEST).read_text()
    assert edit(text) != text
    (path / MANIFEST).write_text(edit(text))
    assert f"{MANIFEST} was edited or is damaged; redo the stage with --force" in refusal(path)


def test_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "embed"
    build(path)
    (path / MANIFEST).write_bytes(b"\xff\x00")
    assert "was edited or is damaged" in refusal(path)


def test_what_is_not_there_or_has_no_manifest_is_not_finished(tmp_path: Path) -> None:
    assert "not there or not finished" in refusal(tmp_path / "embed")
    write_payload(workspace(tmp_path / "embed", "embed", CONFIG, INPUTS))
    assert not exists(tmp_path / "embed")
    assert "not there or not finished" in refusal(tmp_path / "embed")
    assert "not there or not finished" in refusal(tmp_path / "embed.partial")


def test_workspace_of_the_same_work_is_kept(tmp_path: Path) -> None:
    partial = workspace(tmp_path / "embed", "embed", CONFIG, INPUTS)
    write_payload(partial)
    same = workspace(tmp_path / "embed", "embed", dict(reversed(CONFIG.items())), INPUTS)
    assert same == partial
    assert (same / "weights.bin").exists()


@pytest.mark.parametrize(
    ("stage", "config", "inputs"),
    [("train", CONFIG, INPUTS), ("embed", CONFIG | {"seed": 1}, INPUTS), ("embed", CONFIG, {"prepare": "1" * 64}), ("embed", CONFIG, {})],
)
def test_workspace_of_other_work_is_emptied(tmp_path: Path, stage: str, config: dict[str, Any], inputs: dict[str, str]) -> None:
    write_payload(workspace(tmp_path / "embed", "embed", CONFIG, INPUTS))
    partial = workspace(tmp_path / "embed", stage, config, inputs)
    assert [file.name for file in partial.iterdir()] == [IDENTITY]


def test_a_kill_while_emptying_leaves_nothing_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "embed"
    for _ in kills(
        monkeypatch,
        work=lambda: workspace(path, "embed", {"seed": 1}, INPUTS),
        restore=lambda: write_payload(workspace(path, "embed", CONFIG, INPUTS)),
    ):
        names = sorted(file.name for file in workspace(path, "embed", CONFIG, INPUTS).iterdir())
        assert names in ([IDENTITY], ["deep", IDENTITY, "labels.npy", "weights.bin"])


def test_a_kill_while_building_leaves_nothing_that_passes_for_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, number = tmp_path / "embed", 0

    def restore() -> None:
        nonlocal path, number
        path, number = tmp_path / f"embed{number}", number + 1

    for _ in kills(monkeypatch, work=lambda: build(path), restore=restore):
        if exists(path):
            assert read(path).file("weights.bin").read_bytes() == b"\1" * 100
        else:
            assert "not there or not finished" in refusal(path)
        again = build(path)
        assert sorted(again.manifest["files"]) == ["deep/rows.jsonl", "labels.npy", "weights.bin"]
        assert exists(path)


def test_a_kill_while_replacing_leaves_the_old_or_the_new_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "embed", set()

    def restore() -> None:
        build(path, version=1)
        write_payload(workspace(path, "embed", {"seed": 1}, INPUTS), version=2)

    def finish() -> Artifact:
        return commit(workspace(path, "embed", {"seed": 1}, INPUTS), path, "embed", {"seed": 1}, INPUTS, 0.0)

    for _ in kills(monkeypatch, work=finish, restore=restore):
        there = {0: "none", 1: "old", 2: "new"}[read(path).file("weights.bin").read_bytes()[0] if exists(path) else 0]
        seen.add(there)
        if there != "new":
            # The finished work was kept, and one more start turns it into the artifact.
            assert finish().file("weights.bin").read_bytes() == b"\2" * 100
    assert seen == {"old", "none", "new"}
    assert not path.with_name("embed.stale").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, seen = tmp_path / "file", []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: seen.append(file.read_bytes()))
        file.write_bytes(b"old")
        write_atomically(file, b"new")
    assert [*seen, file.read_bytes()] == [b"old", b"new"]
    for _ in kills(monkeypatch, lambda: (write_atomically(file, b"new"), os.unlink(file)), lambda: file.write_bytes(b"old")):
        assert file.read_bytes() in (b"old", b"new")


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_an_array_is_refused_without_being_executed(tmp_path: Path) -> None:
    path, made = tmp_path / "embed", tmp_path / "made"
    build(path)
    for version in ("raw", "npy"):
        artifact._verified.clear()
        if version == "raw":
            (path / "labels.npy").write_bytes(pickle.dumps(Trap(made)))
        else:
            np.save(path / "labels.npy", np.array([Trap(made)], dtype=object), allow_pickle=True)
        assert "labels.npy" in refusal(path)
        # Nor does numpy's default run it, should it come with a manifest of its own.
        with pytest.raises(ValueError, match="allow_pickle="):
            np.load(path / "labels.npy")
    assert not made.exists()
    pickle.loads(pickle.dumps(Trap(made)))
    assert made.exists()
