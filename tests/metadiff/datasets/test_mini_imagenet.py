import shutil
from pathlib import Path

import numpy as np
import pytest

from metadiff.datasets.mini_imagenet import MiniImageNet

LISTS = {
    "train.csv": "filename,label\nn2_1.jpg,n2\nn1_1.jpg,n1\nn1_2.jpg,n1\n",
    "val.csv": "filename,label\r\nn3_1.jpg,n3\r\n",
    "test.csv": "filename,label\nn4_1.jpg,n4\n",
}


@pytest.fixture
def listed(tmp_path, put_images) -> Path:
    root = tmp_path / "mini-imagenet"
    put_images(root, *(f"images/{name}.jpg" for name in ("n1_1", "n1_2", "n2_1", "n3_1", "n4_1", "unlisted")))
    for name, text in LISTS.items():
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("form", ["folder", "folder in a folder", "zip"])
def test_lists(listed, form):
    root = {"folder": listed, "folder in a folder": listed.parent, "zip": listed.parent / "mini.zip"}[form]
    if form == "zip":
        shutil.make_archive(str(listed.parent / "mini"), "zip", listed.parent, "mini-imagenet")
    sources = MiniImageNet(root=root).sources(seed=0)
    top = root if form == "folder" else root / "mini-imagenet"
    assert {split: (list(source.classes), source.labels.tolist()) for split, source in sources.items()} == {
        "base": (["n1", "n2"], [0, 0, 1]),
        "val": (["n3"], [0]),
        "novel": (["n4"], [0]),
    }
    assert list(sources["base"].names) == [f"{top}/images/{name}.jpg" for name in ("n1_1", "n1_2", "n2_1")]
    np.testing.assert_allclose(np.asarray(sources["base"].open(2)), 2, atol=2)


def test_class_folders(tmp_path, put_images):
    put_images(tmp_path, "train/n1/1.jpg", "train/n2/1.jpg", "test/n4/1.jpg")
    sources = MiniImageNet(root=tmp_path).sources(seed=0)
    assert {split: list(source.classes) for split, source in sources.items()} == {"base": ["n1", "n2"], "novel": ["n4"]}


def test_lists_beside_class_folders_give_way_to_them(tmp_path, put_images):
    put_images(tmp_path, "train/n1/1.jpg", "val/n3/1.jpg")
    (tmp_path / "train.csv").write_text(LISTS["train.csv"])
    assert list(MiniImageNet(root=tmp_path).sources(seed=0)) == ["base", "val"]


def test_a_split_without_list_or_without_any_image_is_absent(listed):
    (listed / "val.csv").unlink()
    (listed / "images/n4_1.jpg").unlink()
    assert list(MiniImageNet(root=listed).sources(seed=0)) == ["base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.csv": "file,label\nn1_1.jpg,n1\n"}, "train.csv: its first line is 'file,label'; expected filename,label"),
        ({"train.csv": ""}, "train.csv: its first line is ''; expected filename,label"),
        ({"val.csv": "filename,label\n"}, "val.csv: lists no image"),
        ({"val.csv": "filename,label\nn3_1.jpg\n"}, "val.csv: the line 'n3_1.jpg' names no image and class"),
        ({"val.csv": "filename,label\nn3_1.jpg,\n"}, "val.csv: the line 'n3_1.jpg,' names no image and class"),
        ({"train.csv": LISTS["train.csv"] + "gone.jpg,n1\nlost.jpg,n1\n"}, "train.csv: gone.jpg (2 of 5 images) is not in"),
        ({"train.csv": LISTS["train.csv"] + "../val.csv,n1\n"}, "train.csv: ../val.csv (1 of 4 images) is not in"),
        (
            {"train.csv": "filename,label\ngone.jpg,n1\n"},
            "none of the base images in it; expected mini-ImageNet: images/*.jpg with train.csv",
        ),
        ({"test.csv": "filename,label\nn4_1.jpg,n2\n"}, "class n2 is in both base and novel"),
    ],
)
def test_wrong_lists(listed, refusal, change, message):
    for name, text in change.items():
        (listed / name).write_text(text)
    assert message in refusal(MiniImageNet(root=listed))


def test_wrong_layouts(tmp_path, put_images, refusal):
    dataset = MiniImageNet(root=tmp_path / "mini")
    assert "mini: no such folder or zip; expected mini-ImageNet" in refusal(dataset)
    put_images(tmp_path / "mini", "pictures/1.jpg")
    assert "mini: neither train.csv nor train/ in it; expected mini-ImageNet" in refusal(dataset)
    (tmp_path / "mini/train/n1").mkdir(parents=True)
    assert "mini/train/n1: a class folder without images; delete it or add images" in refusal(dataset)
    (tmp_path / "mini/train.csv").write_bytes(b"\xff\xfe")
    put_images(tmp_path / "mini", "images/1.jpg")
    assert "mini/train.csv: cannot be read as text" in refusal(dataset)


def test_the_real_data(real_data):
    sources = MiniImageNet(root=real_data / "mini-imagenet-trainval.zip").sources(seed=0)
    counts = {split: np.bincount(source.labels).tolist() for split, source in sources.items()}
    assert counts == {"base": [600] * 64, "val": [600] * 16}
    for source in sources.values():
        assert all(source.open(i).size == (84, 84) for i in range(0, len(source), 997))
        assert all(source.classes[int(label)] in name for label, name in zip(source.labels, source.names, strict=True))
