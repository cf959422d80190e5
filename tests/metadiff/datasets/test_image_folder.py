import shutil

import pytest

from metadiff.datasets.image_folder import ImageFolder

PATHS = ("base/cat/1.png", "base/cat/2.JPG", "base/dog/1.webp", "val/fox/1.bmp", "novel/owl/1.gif", "novel/owl/2.TIFF")


def test_splits_classes_and_images(tmp_path, put_images):
    put_images(tmp_path, *PATHS)
    for name in (".DS_Store", "Thumbs.db", "README.txt"):
        (tmp_path / "base" / name).write_text("")
        (tmp_path / "base/cat" / name).write_text("")
    sources = ImageFolder(root=tmp_path).sources(seed=0)
    assert {split: (list(source.classes), source.labels.tolist()) for split, source in sources.items()} == {
        "base": (["cat", "dog"], [0, 0, 1]),
        "val": (["fox"], [0]),
        "novel": (["owl"], [0, 0]),
    }
    assert list(sources["base"].names) == [f"{tmp_path}/{path}" for path in PATHS[:3]]
    assert sources["novel"].open(1).getpixel((0, 0)) == (5, 5, 5)
    assert sources["novel"].open(1).size == (6, 5)


def test_a_zip_of_one_folder_serves_as_well(tmp_path, put_images):
    put_images(tmp_path / "in/mine", *PATHS)
    shutil.make_archive(str(tmp_path / "mine"), "zip", tmp_path / "in")
    sources = ImageFolder(root=tmp_path / "mine.zip").sources(seed=0)
    assert sources["base"].names[2] == f"{tmp_path}/mine.zip/mine/base/dog/1.webp"
    assert sources["base"].open(2).mode == "RGB"


def test_val_and_novel_may_be_absent(tmp_path, put_images):
    put_images(tmp_path, *PATHS[:3])
    assert list(ImageFolder(root=tmp_path).sources(seed=0)) == ["base"]


def test_text_named_jpg_fails_only_when_opened(tmp_path, put_images):
    put_images(tmp_path, *PATHS)
    (tmp_path / "base/dog/2.jpg").write_text("not an image")
    source = ImageFolder(root=tmp_path).sources(seed=0)["base"]
    with pytest.raises(OSError, match=r"base/dog/2\.jpg: not a readable image"):
        source.open(3)


def test_wrong_layouts(tmp_path, put_images, refusal):
    mine = ImageFolder(root=tmp_path / "mine")
    assert refusal(mine).startswith(f"{tmp_path}/mine: no such folder or zip; expected base/<class>/")
    put_images(tmp_path / "mine", "train/cat/1.png")
    assert "mine: no base/ in it; expected base/<class>/" in refusal(mine)
    put_images(tmp_path / "mine", *PATHS)
    (tmp_path / "mine/novel/empty").mkdir()
    (tmp_path / "mine/novel/empty/notes.txt").write_text("")
    assert refusal(mine) == f"{tmp_path}/mine/novel/empty: a class folder without images; delete it or add images"
    shutil.rmtree(tmp_path / "mine/novel/empty")
    put_images(tmp_path / "mine", "novel/cat/1.png")
    assert "class cat is in both base and novel" in refusal(mine)
    shutil.rmtree(tmp_path / "mine/novel/cat")
    shutil.rmtree(tmp_path / "mine/val/fox")
    assert "mine/val: no class folder in it" in refusal(mine)
