"""The stage `train` on the engine: support sets out of features and out of images, in one process and in Ray's workers."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed.pipeline import main
from metadiff.__main__ import main as in_one_process
from metadiff.checkpoint import load_state
from metadiff.metrics import read_rows
from tests.refusal import only_error
from tests.tiny import write_config

EXACT = {"source": "images", "augment": False, "backbone_precision": "fp32"}


def trained(folder: Path, variant: str, workers: int = 0, loader: str = "ffcv", **train: object) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and the weights of 2-shot after the tiny run's training as `variant`."""
    sections = {"embed": {"dtype": "fp32"}, "episodes": {"shots": [2]}, "train": {"checkpoint_every": 50, **train}}
    if loader == "none":
        config = write_config(folder, **sections)
        assert in_one_process(["train", str(config), f"run.variant={variant}"]) == 0
    else:
        config = write_config(folder, ray={"num_workers": workers, "num_actors": 0}, loader={"kind": loader}, **sections)
        assert main([str(config), f"run.variant={variant}"], "train") == 0
    assert not any(type(thread).__name__ == "DecodingThread" for thread in threading.enumerate()), "decoding ends with the training"
    made = folder / "runs/tiny/train" / variant
    return [row["loss"] for row in read_rows(made / "2shot.jsonl")], load_state(made / "2shot.safetensors")["denoiser"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all trainings of this file share one prepared and embedded run, from raw `.beton` files."""
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def from_images(folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Trained on the images as they are, in full precision."""
    return trained(folder, "images", **EXACT)


def assert_near(ours: tuple[list[float], dict[str, Tensor]], theirs: tuple[list[float], dict[str, Tensor]], bound: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=bound)
    assert len(ours[0]) == 2
    for name, weight in ours[1].items():
        torch.testing.assert_close(weight, theirs[1][name], rtol=0, atol=bound)


def test_features_and_images_train_alike(folder: Path, from_images: tuple[list[float], dict[str, Tensor]]) -> None:
    assert_near(trained(folder, "features"), from_images, 1e-4)


def test_two_workers_train_as_one_process(folder: Path, from_images: tuple[list[float], dict[str, Tensor]]) -> None:
    assert_near(trained(folder, "workers", workers=2, **EXACT), from_images, 1e-4)


def test_one_process_goes_on_from_the_engine_s_images(folder: Path, from_images: tuple[list[float], dict[str, Tensor]]) -> None:
    """`metadiff` by itself has no FFCV; the images are the same."""
    assert_near(trained(folder, "alone", loader="none", **EXACT), from_images, 1e-4)


def test_images_are_augmented_and_rounded_unless_told_otherwise(folder: Path, from_images: tuple[list[float], dict[str, Tensor]]) -> None:
    (first, _), (second, _) = from_images, trained(folder, "shipped", source="images")
    assert first != pytest.approx(second, rel=1e-3)
    assert first == pytest.approx(second, rel=0.5)


@pytest.mark.usefixtures("from_images")
def test_images_need_ffcv_where_features_do_not(folder: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    sections = {"embed": {"dtype": "fp32"}, "episodes": {"shots": [2]}, "train": {"source": "images"}}
    config = write_config(folder, ray={"num_workers": 0, "num_actors": 0}, **sections)
    assert main([str(config), "run.variant=refused"], "train") == 2
    only_error(capfd, "FFCV cannot be imported", "loader.kind=memory")
    assert not list(folder.rglob("refused*"))
    assert main([str(config), "run.variant=taken", "train.source=features"], "train") == 0
