"""Samplers that cannot work, refused before the first image is decoded."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadiff import preflight
from metadiff.errors import UserError
from metadiff.pipeline import load_config
from tests.tiny import write_config


@pytest.mark.parametrize(
    ("sampler", "evaluate", "words"),
    [
        ({"steps": 21}, {}, r"sampler.steps=21: the schedule has only 20 .*lower it"),
        ({"method": "ddim"}, {"sampler": "auto"}, "sampler.method='ddim' does not go with evaluate.sampler=auto.*evaluate.sampler=given"),
        ({"steps": 5}, {"sampler": "auto"}, "sampler.steps=5 does not go"),
        ({"stochastic": True}, {"sampler": "auto"}, "sampler.stochastic=True does not go"),
    ],
)
def test_sampler_that_cannot_work_is_refused_in_one_line(tmp_path: Path, sampler: dict, evaluate: dict, words: str) -> None:
    settings = load_config(write_config(tmp_path, sampler=sampler, evaluate=evaluate))
    with pytest.raises(UserError, match=words) as refused:
        preflight.check(settings, ["evaluate"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sampler", "evaluate"), [({"steps": 20}, {}), ({"precision": "bf16", "chunk": 3}, {"sampler": "auto"}), ({"method": "ddim"}, {})]
)
def test_what_can_work_is_let_through(tmp_path: Path, sampler: dict, evaluate: dict) -> None:
    preflight.check(load_config(write_config(tmp_path, sampler=sampler, evaluate=evaluate)), ["evaluate"])


def _class_folders(root: Path, *splits: str) -> None:
    for split in splits:
        for name in "abcdef":
            (root / split / f"{split}-{name}").mkdir(parents=True)
            for i in range(12):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / split / f"{split}-{name}" / f"{i}.png")


def test_gate_needs_validation_classes_and_enough_of_their_images(tmp_path: Path) -> None:
    root = tmp_path / "images"
    _class_folders(root, "base", "novel")
    data, choosing = {"kind": "image_folder", "root": str(root)}, {"split": "novel", "sampler": "auto"}
    settings = load_config(write_config(tmp_path, data=data, evaluate=choosing))
    with pytest.raises(UserError, match=r"on the split 'val', but the data set has only base, novel; .* evaluate\.sampler=given"):
        preflight.check(settings, ["evaluate"])
    preflight.check(load_config(write_config(tmp_path, data=data, evaluate={"split": "novel"})), ["evaluate"])
    _class_folders(root, "val")
    preflight.check(settings, ["evaluate"])
    shutil.rmtree(root / "val" / "val-a")
    preflight.check(settings, ["evaluate"])
    for image in sorted((root / "val" / "val-b").iterdir())[5:]:
        image.unlink()
    with pytest.raises(UserError, match="split 'val'"):
        preflight.check(settings, ["evaluate"])
