"""Bad input: each mistake gets one clear line, exit code 2, and nothing written."""

import errno
import fcntl
import json
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metadiff import artifact
from metadiff.__main__ import main
from metadiff.checkpoint import load_state, save_state
from tests.refusal import only_error
from tests.tiny import write_config

Arrange = Callable[[Path], Any]


def sections(**changed: dict) -> Arrange:
    """A tiny configuration with some sections changed."""
    return lambda folder: write_config(folder, **changed)


def text(content: str) -> Arrange:
    """A configuration file with this text."""
    return lambda folder: (folder / "tiny.yaml").write_text(content)


def class_folders(change: Callable[[Path], Any], split_to_score: str = "val") -> Arrange:
    """An image folder of two splits, damaged by `change`."""

    def arrange(folder: Path) -> None:
        rng = np.random.default_rng(0)
        for split in ("base", "val"):
            for name in "abcdef":
                (folder / "images" / split / f"{split}-{name}").mkdir(parents=True)
                for i in range(12):
                    pixels = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
                    pixels.save(folder / "images" / split / f"{split}-{name}" / f"{i}.jpg")
        change(folder / "images")
        write_config(folder, data={"kind": "image_folder", "root": str(folder / "images")}, evaluate={"split": split_to_score})

    return arrange


def mini_imagenet(member: str, content: str) -> Arrange:
    """A zip with one more member than a mini-ImageNet has."""

    def arrange(folder: Path) -> None:
        with zipfile.ZipFile(folder / "mini.zip", "w") as archive:
            archive.writestr("train.csv", "filename,label\na.jpg,n1\n")
            archive.writestr(member, content)
        write_config(folder, data={"kind": "mini_imagenet", "root": str(folder / "mini.zip")})

    return arrange


def file(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes(content)


def truncate(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:300])


def empty(name: str) -> Callable[[Path], Any]:
    return lambda root: (root / name).mkdir()


def copied(name: str, to: str) -> Callable[[Path], Any]:
    return lambda root: shutil.copytree(root / name, root / to)


def nothing(root: Path) -> None:
    """Leave the images as they are."""


# name -> (what is wrong, command line after the stage and the configuration, words of the message)
MISTAKES: dict[str, tuple[Arrange, list[str], tuple[str, ...]]] = {
    "no config": (lambda folder: None, [], ("no such file", "configs/")),
    "not YAML": (text("run: {name: [}"), [], ("not valid YAML",)),
    "a list": (text("- 1\n- 2\n"), [], ("mapping", "list")),
    "empty config": (text(""), [], ("run", "required")),
    "unknown section": (sections(), ["trian.iterations=5"], ("'trian'", "did you mean 'train'")),
    "unknown key": (sections(), ["train.iteratons=5"], ("'train.iteratons'", "did you mean 'iterations'")),
    "unknown key of a data set": (sections(), ["data.images_per_clas=5"], ("did you mean 'images_per_class'",)),
    "wrong type": (sections(), ["train.batch_size=many"], ("train.batch_size='many'", "integer")),
    "out of range": (sections(), ["train.learning_rate=-1"], ("train.learning_rate=-1", "greater than 0")),
    "a section that is a number": (sections(), ["train=5"], ("train",)),
    "not finite": (sections(), ["train.learning_rate=.nan"], ("train.learning_rate", "finite")),
    "unknown preset": (sections(), ["denoiser.preset=best"], ("denoiser.preset='best'", "stable")),
    "unknown data set": (sections(), ["data.kind=imagenet"], ("'imagenet'", "mini_imagenet")),
    "data set without a root": (sections(data={"kind": "omniglot"}), [], ("data.root", "required")),
    "override without =": (sections(), ["train.iterations"], ("key.subkey=value",)),
    "override that is not YAML": (sections(), ["train.iterations=[1"], ("not valid YAML",)),
    "unknown flag": (sections(), ["--fast"], ("--fast",)),
    "run name that leaves its folder": (sections(), ["run.name=../elsewhere"], ("run.name", "match")),
    "negative seed": (sections(), ["seed=-1"], ("seed=-1",)),
    "the same shots twice": (sections(), ["episodes.shots=[1, 1]"], ("episodes.shots", "different")),
    "options that exclude each other": (sections(), ["denoiser.form=consistent"], ("form='consistent'",)),
    "an average that begins after the end": (sections(), ["train.ema_start=1000"], ("ema_start=1000", "iterations=100")),
    "linear learner with class means": (sections(), ["learner.kind=linear", "denoiser.gradient=ce"], ("linear", "ce")),
    "linear learner with the prototypes' loss": (sections(), ["learner.kind=linear", "targets.kind=ce"], ("denoiser.gradient",)),
    "more ways than classes": (sections(), ["episodes.way=7"], ("episodes.way=7", "6 classes")),
    "more shots than images": (sections(), ["episodes.shots=[9]"], ("9 shots + 4 query", "12 images")),
    "batch larger than the data": (sections(), ["pretrain.batch_size=1000"], ("pretrain.batch_size=1000", "72 images")),
    "images too small": (sections(), ["prepare.image_size=8"], ("prepare.image_size=8", "too small")),
    "no data": (sections(data={"kind": "omniglot", "root": "nowhere"}), [], ("nowhere", "images_background")),
    "no such layout": (class_folders(lambda root: shutil.move(root / "base", root / "training")), [], ("base",)),
    "empty class folder": (class_folders(empty("base/base-g")), [], ("base-g", "without images")),
    "text named .jpg": (class_folders(file("base/base-a/0.jpg", b"hello")), [], ("base-a/0.jpg", "skip_bad_images")),
    "truncated image": (class_folders(truncate("val/val-c/3.jpg")), [], ("val-c/3.jpg", "skip_bad_images")),
    "class in two splits": (class_folders(copied("base/base-a", "val/base-a")), [], ("base-a", "val")),
    "no novel split": (class_folders(nothing, "novel"), [], ("'novel'", "base, val")),
    "zip that climbs out": (mini_imagenet("../../evil.jpg", "x"), [], ("../../evil.jpg",)),
    "damaged zip": (
        lambda folder: (
            write_config(folder, data={"kind": "mini_imagenet", "root": str(folder / "m.zip")}),
            (folder / "m.zip").write_text("x"),
        ),
        [],
        ("m.zip",),
    ),
    "list with another header": (mini_imagenet("val.csv", "image,class\na.jpg,n1\n"), [], ("filename,label",)),
    "list of missing images": (mini_imagenet("images/b.jpg", "x"), [], ("train.csv",)),
    "a run folder that is a file": (
        lambda folder: (write_config(folder), (folder / "runs").write_text("")),
        [],
        ("runs", "run.dir"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_and_nothing_written(mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    arrange, words, expected = MISTAKES[mistake]
    arrange(tmp_path)
    before = snapshot(tmp_path)
    assert main(["pipeline", str(tmp_path / "tiny.yaml"), *words]) == 2
    only_error(capfd, *expected)
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> set[Path]:
    return {*folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["pipeline", str(write_config(folder))]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path)
    return tmp_path / "runs" / "tiny"


def refuse(run: Path, stage: str, capfd: pytest.CaptureFixture, *expected: str, overrides: tuple[str, ...] = ()) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([stage, str(run.parents[1] / "tiny.yaml"), *overrides]) == 2
    only_error(capfd, *expected)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_artifact_of_another_configuration(run: Path, capfd: pytest.CaptureFixture) -> None:
    refuse(run, "pipeline", capfd, "pretrain.epochs=2", "says 3", "--force", overrides=("pretrain.epochs=3",))


def test_edited_manifest(run: Path, capfd: pytest.CaptureFixture) -> None:
    manifest = run / "pretrain" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"epochs": 2', '"epochs": 3'))
    refuse(run, "embed", capfd, "pretrain", "manifest.json was edited", "--force")


def test_manifest_that_is_not_json(run: Path, capfd: pytest.CaptureFixture) -> None:
    (run / "embed" / "manifest.json").write_text("{")
    refuse(run, "train", capfd, "embed", "damaged", "--force")


@pytest.mark.parametrize("name", ["prepare/base.images.npy", "pretrain/backbone.safetensors", "train/stable/1shot.safetensors"])
def test_truncated_file(run: Path, name: str, capfd: pytest.CaptureFixture) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-100])
    refuse(run, "evaluate", capfd, Path(name).name, f"{len(content) - 100} bytes", "--force")


def test_flipped_byte(run: Path, capfd: pytest.CaptureFixture) -> None:
    content = bytearray((run / "embed" / "base.features.npy").read_bytes())
    content[-7] ^= 1
    (run / "embed" / "base.features.npy").write_bytes(content)
    refuse(run, "train", capfd, "base.features.npy", "checksum", "--force")


def test_missing_file(run: Path, capfd: pytest.CaptureFixture) -> None:
    (run / "fit_targets" / "stable" / "targets.npy").unlink()
    refuse(run, "train", capfd, "targets.npy is missing", "--force")


def recommit(made: Path) -> None:
    """Sign a tampered artifact anew, as a tool that does not know better might."""
    manifest = json.loads((made / "manifest.json").read_text())
    shutil.move(made, artifact.partial_path(made))
    artifact.commit(artifact.partial_path(made), made, manifest["stage"], manifest["config"], manifest["inputs"], 0.0)


def test_features_that_are_not_finite(run: Path, capfd: pytest.CaptureFixture) -> None:
    features = np.load(run / "embed" / "base.features.npy")
    features[0, 3, 5] = np.nan
    np.save(run / "embed" / "base.features.npy", features)
    recommit(run / "embed")
    refuse(run, "fit_targets", capfd, "NaN", "pretrain")


def test_denoiser_of_other_features(run: Path, capfd: pytest.CaptureFixture) -> None:
    path = run / "train" / "stable" / "1shot.safetensors"
    state = load_state(path)["denoiser"]
    save_state(path, {"denoiser": {name: torch.cat([value, value]) for name, value in state.items()}})
    recommit(run / "train" / "stable")
    refuse(run, "evaluate", capfd, "1shot.safetensors", "does not fit", "--force")


@pytest.mark.parametrize(
    ("stage", "module", "name", "weights"),
    [("pretrain", "pretraining", "checkpoint-1", "backbone"), ("train", "training", "1shot.checkpoint-50", "1shot")],
)
def test_truncated_checkpoint(
    stage: str,
    module: str,
    name: str,
    weights: str,
    run: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one kind of damage that is mended: training starts again, says so, and ends with the weights of a run without it."""
    (tmp_path / "killed").mkdir()
    config = write_config(tmp_path / "killed")

    def killed_at_the_second_row(path: Path, index: int, row: dict[str, Any]) -> None:
        if index:
            raise KeyboardInterrupt

    monkeypatch.setattr(f"metadiff.{module}.write_row", killed_at_the_second_row)
    assert main([stage, str(config)]) == 130
    monkeypatch.undo()
    (found,) = (tmp_path / "killed").rglob(f"{name}.safetensors")
    found.write_bytes(found.read_bytes()[:1000])
    capfd.readouterr()
    assert main([stage, str(config)]) == 0
    assert f"{name}.safetensors: unfinished or damaged; starts afresh" in capfd.readouterr().err
    (made,), (expected,) = (list(folder.rglob(f"{weights}.safetensors")) for folder in (tmp_path / "killed", run))
    assert made.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_disk_trouble(number: int, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(number, "trouble", str(path))

    config = write_config(tmp_path)
    monkeypatch.setattr("metadiff.images.write_atomically", fail)
    assert main(["prepare", str(config)]) == 2
    only_error(capfd, "trouble", "run.dir")
    assert not list(tmp_path.rglob("manifest.json")), "nothing passes for finished"
    monkeypatch.undo()
    assert main(["prepare", str(config)]) == 0, "once there is room, the same command goes on"


def test_no_room_for_an_array(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("metadiff.arrays.os.posix_fallocate", full)
    assert main(["prepare", str(write_config(tmp_path))]) == 2
    only_error(capfd, "No space left", "run.dir")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_folder_that_nobody_may_write_to(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["prepare", str(write_config(tmp_path)), "run.dir=/proc/1"]) == 2
    only_error(capfd, "/proc/1", "run.dir")


def test_two_commands_in_one_run(run: Path, capfd: pytest.CaptureFixture) -> None:
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuse(run, "prepare", capfd, "another command", "run.name")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["prepare", str(write_config(tmp_path)), "machine.device=cuda"]) == 2
    only_error(capfd, "machine.device", "cpu")


def test_stage_that_does_not_exist(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert main(["trian", str(write_config(tmp_path))]) == 2
    only_error(capfd, "'trian'", "evaluate")
