import pickle
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from metadiff.config import config, dump, validate
from metadiff.datasets import DatasetConfig
from metadiff.datasets.glyphs import Glyphs
from metadiff.datasets.image_folder import ImageFolder
from metadiff.errors import UserError


@config
class Run:
    dataset: DatasetConfig


@pytest.mark.parametrize("kind", ["mini_imagenet", "omniglot", "image_folder", "tiered_imagenet", "cifar_fs", "fc100", "glyphs"])
def test_the_kind_chooses_the_data_set(kind):
    options = (
        {} if kind == "glyphs" else {"root": "there"} | ({"splits": "lists"} if kind in ("tiered_imagenet", "cifar_fs", "fc100") else {})
    )
    dataset = TypeAdapter(DatasetConfig).validate_python({"kind": kind} | options)
    assert dataset.kind == kind
    assert dump(dataset).items() >= ({"kind": kind} | options).items()


def test_an_unknown_kind_and_an_unknown_key_are_named():
    with pytest.raises(UserError, match=r"dataset: .*'omniglott' .*'cifar_fs'.*'omniglot'"):
        validate(Run, {"dataset": {"kind": "omniglott"}}, "run.yaml")
    with pytest.raises(UserError, match=r"unknown key 'dataset\.rot'; did you mean 'root'\?"):
        validate(Run, {"dataset": {"kind": "image_folder", "rot": "x"}}, "run.yaml")


def test_sources_can_be_sent_to_another_process(tmp_path, put_images):
    put_images(tmp_path, "base/a/1.png", "base/b/1.png")
    for dataset in (ImageFolder(root=tmp_path), Glyphs()):
        source = dataset.sources(seed=0)["base"]
        again = pickle.loads(pickle.dumps(source))
        assert again.names == source.names
        assert again.open(1).tobytes() == source.open(1).tobytes()


def test_a_root_may_be_relative(tmp_path, put_images, monkeypatch):
    put_images(tmp_path, "base/a/1.png")
    monkeypatch.chdir(tmp_path)
    assert ImageFolder(root=Path()).sources(seed=0)["base"].open(0).size == (6, 5)
