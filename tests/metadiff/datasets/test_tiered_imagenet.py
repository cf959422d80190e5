import shutil
from pathlib import Path

import pytest

from metadiff.datasets.folders import class_lists
from metadiff.datasets.tiered_imagenet import TieredImageNet

CLASSES = {"train": ("n00000001", "n00000002", "n00000003"), "val": ("n00000004", "n00000005"), "test": ("n00000006",)}
SPLITS = {"base": CLASSES["train"], "val": CLASSES["val"], "novel": CLASSES["test"]}


@pytest.fixture
def splits(tmp_path) -> Path:
    folder = tmp_path / "splits"
    folder.mkdir()
    for name, classes in CLASSES.items():
        (folder / f"{name}.csv").write_text("".join(f"{wnid},n99999999\n" for wnid in reversed(classes)))
    return folder


@pytest.fixture
def root(tmp_path, put_images) -> Path:
    put_images(tmp_path / "root", *(f"{wnid}/{i}.JPEG" for classes in CLASSES.values() for wnid in classes for i in (1, 2)))
    put_images(tmp_path / "root", "n77777777/1.JPEG")
    return tmp_path / "root"


def test_class_folders_at_the_top_of_which_only_listed_ones_are_read(root, splits):
    sources = TieredImageNet(root=root, splits=splits).sources(seed=0)
    assert {split: tuple(source.classes) for split, source in sources.items()} == SPLITS
    assert sources["base"].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert sources["base"].names[2] == f"{root}/n00000002/1.JPEG"
    assert sources["base"].open(2).size == (6, 5)


@pytest.mark.parametrize("split_folders", [("train", "val", "test"), ("train", "train", "train")])
def test_class_folders_in_split_folders(tmp_path, put_images, splits, split_folders):
    for place, classes in zip(split_folders, CLASSES.values(), strict=True):
        put_images(tmp_path / "in", *(f"tiered/{place}/{wnid}/1.JPEG" for wnid in classes))
    sources = TieredImageNet(root=tmp_path / "in", splits=splits).sources(seed=0)
    assert {split: tuple(source.classes) for split, source in sources.items()} == SPLITS


def test_a_split_without_list_or_without_any_folder_is_absent(root, splits):
    (splits / "val.csv").unlink()
    shutil.rmtree(root / "n00000006")
    assert list(TieredImageNet(root=root, splits=splits).sources(seed=0)) == ["base"]


def test_missing_and_empty_and_doubled_classes(root, splits, put_images, refusal):
    dataset = TieredImageNet(root=root, splits=splits)
    shutil.rmtree(root / "n00000005")
    assert "class n00000005 has no folder (1 of the 2 val classes have none); add what is missing" in refusal(dataset)
    (root / "n00000005").mkdir()
    assert "n00000005: a class folder without images" in refusal(dataset)
    put_images(root, "n00000005/1.JPEG", "val/n00000002/1.JPEG")
    assert f"class n00000002 is both in {root}/n00000002 and in {root}/val/n00000002" in refusal(dataset)
    shutil.rmtree(root / "val")
    (splits / "test.csv").write_text("n00000001,n99999999\n")
    assert "class n00000001 is in both base and novel" in refusal(dataset)


def test_wrong_roots_and_lists(tmp_path, root, splits, put_images, refusal):
    assert "none: no such folder or zip; expected <wnid>/*.JPEG" in refusal(TieredImageNet(root=tmp_path / "none", splits=splits))
    put_images(tmp_path / "other", "cat/1.png")
    assert "other: no folder of any class of the base list; expected <wnid>" in refusal(
        TieredImageNet(root=tmp_path / "other", splits=splits)
    )
    dataset = TieredImageNet(root=root, splits=splits)
    (splits / "val.csv").write_text("wnid,group\n")
    assert "val.csv: the line 'wnid,group'; expected a class on each line, like n01530575,n01524359" in refusal(dataset)
    (splits / "val.csv").write_text("\n")
    assert "val.csv: nothing in it; expected a class on each line" in refusal(dataset)
    (splits / "train.csv").unlink()
    assert "splits: no train.csv in it; expected class lists train.csv, val.csv and test.csv" in refusal(dataset)
    assert "nowhere: no such folder or zip; expected a folder of class lists" in refusal(
        TieredImageNet(root=root, splits=tmp_path / "nowhere")
    )


def test_the_published_lists(real_data):
    lists = class_lists(real_data / "splits/tiered_imagenet", ".csv", r"(n\d{8}),n\d{8}", example="")
    assert {split: len({*names}) for split, names in lists.items()} == {"base": 351, "val": 97, "novel": 160}
    assert len({name for names in lists.values() for name in names}) == 608
