import os
import pickle
import shutil
import struct
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest

from metadiff.datasets.cifar import CifarFs, Fc100
from metadiff.datasets.cifar_archive import find_archive
from metadiff.errors import UserError

CLASSES = ["apple", "bear", "cattle", "dinosaur"]
LISTS = {"train.txt": "apple\ncattle\n", "val.txt": "dinosaur\n", "test.txt": "bear"}
PER_CLASS = {"train": 5, "test": 2}


def python2(value) -> bytes:
    """`value` as Python 2 and the numpy of 2009 pickled it, which today's cannot write."""
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(python2(each) for each in value) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(each) for pair in value.items() for each in pair) + b"u"
    assert isinstance(value, np.ndarray)
    dtype = (
        b"cnumpy\ndtype\n"
        + python2(value.dtype.str[1:].encode())
        + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    order, is_fortran = ("F", b"\x88") if value.flags.f_contiguous else ("C", b"\x89")
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"".join(map(python2, value.shape)) + b"\x86"
    return empty + b"(K\x01" + shape + dtype + is_fortran + python2(value.tobytes(order)) + b"tb"


def pickled(value) -> bytes:
    return b"\x80\x02" + python2(value) + b"."


def batch(name: str, order: str = "C") -> dict[bytes, object]:
    count = PER_CLASS[name] * len(CLASSES)
    data = np.random.default_rng(len(name)).integers(0, 256, (count, 3072), np.uint8)
    return {
        b"filenames": [f"{name}_{i}.png".encode() for i in range(count)],
        b"fine_labels": [i % len(CLASSES) for i in range(count)],
        b"data": np.asarray(data, order=order),  # type: ignore[call-overload]
    }


@pytest.fixture
def archive(tmp_path) -> Path:
    folder = tmp_path / "cifar/cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "meta").write_bytes(pickled({b"fine_label_names": [name.encode() for name in CLASSES]}))
    for name in PER_CLASS:
        (folder / name).write_bytes(pickled(batch(name)))
    return folder


@pytest.fixture
def splits(tmp_path) -> Path:
    folder = tmp_path / "splits"
    folder.mkdir()
    for name, text in LISTS.items():
        (folder / name).write_text(text)
    return folder


def pack(archive: Path) -> Path:
    path = archive.parent / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        packed.add(archive, "cifar-100-python")
    shutil.rmtree(archive)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_pickles_made_here_are_what_numpy_reads(order):
    made = batch("train", order)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = pickle.loads(pickled(made), encoding="bytes")
    np.testing.assert_array_equal(read.pop(b"data"), made.pop(b"data"))
    assert read == made


@pytest.mark.parametrize("kind", [CifarFs, Fc100])
@pytest.mark.parametrize("given", ["parent", "folder", "packed in parent", "packed"])
def test_the_archive_packed_or_not(archive, splits, kind, given):
    packed = pack(archive) if "packed" in given else archive
    root = packed.parent if "parent" in given else packed
    sources = kind(root=root, splits=splits).sources(seed=0)
    assert {split: list(source.classes) for split, source in sources.items()} == {
        "base": ["apple", "cattle"],
        "val": ["dinosaur"],
        "novel": ["bear"],
    }
    assert sources["base"].labels.tolist() == [0] * 7 + [1] * 7, "train and test images of a class together"
    novel = sources["novel"]
    assert [Path(name).name for name in novel.names[4:]] == ["train: train_17.png", "test: test_1.png", "test: test_5.png"]
    rows = batch("test")[b"data"]
    assert isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(np.asarray(novel.open(6)), rows[5].reshape(3, 32, 32).transpose(1, 2, 0))
    assert novel.open(6).mode == "RGB"


def test_an_array_in_columns_is_read_as_such(archive, splits):
    sources = CifarFs(root=archive, splits=splits).sources(seed=0)
    (archive / "train").write_bytes(pickled(batch("train", "F")))
    again = CifarFs(root=archive, splits=splits).sources(seed=0)
    np.testing.assert_array_equal(np.asarray(again["base"].open(3)), np.asarray(sources["base"].open(3)))


class Command:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_names_anything_else_is_not_run(archive, splits, refusal, monkeypatch, tmp_path, protocol):
    monkeypatch.chdir(tmp_path)
    (archive / "train").write_bytes(pickle.dumps({b"data": Command()}, protocol))
    assert "never does: do not trust it" in refusal(CifarFs(root=archive, splits=splits))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickled(batch("train"))[:-20],
        pickled({b"filenames": []}),
        pickled([1]),
        pickled(batch("train") | {b"fine_labels": [0]}),
        pickled(batch("train") | {b"fine_labels": [99] * 20}),
        pickled(batch("train") | {b"data": [1, 2]}),
        pickled(batch("train") | {b"data": np.zeros((20, 100), np.uint8)}),
        pickled(batch("train") | {b"data": np.zeros((20, 3072), np.float32)}),
    ],
)
def test_a_damaged_archive_is_refused(archive, content):
    (archive / "train").write_bytes(content)
    with pytest.raises(
        UserError, match=r"cifar-100-python: not the python archive of CIFAR-100 \(.+\); fetch it again from cs\.toronto\.edu"
    ):
        find_archive(archive)


def test_an_incomplete_or_cut_archive_is_refused(archive, refusal, splits):
    (archive / "test").unlink()
    assert "not the python archive of CIFAR-100" in refusal(CifarFs(root=archive.parent, splits=splits))
    path = pack(archive)
    assert "not the python archive of CIFAR-100 (no test in it)" in refusal(CifarFs(root=path, splits=splits))
    path.write_bytes(path.read_bytes()[:1000])
    assert "tar.gz: not the python archive of CIFAR-100" in refusal(CifarFs(root=path, splits=splits))


@pytest.mark.parametrize("layout", ["{name}", "data/{name}", "{split}/{name}"])
def test_class_folders(tmp_path, put_images, splits, layout):
    for split, name in {"train": "apple", "train ": "cattle", "val": "dinosaur", "test": "bear"}.items():
        put_images(tmp_path / "folders", f"{layout.format(split=split.strip(), name=name)}/1.png")
    sources = Fc100(root=tmp_path / "folders", splits=splits).sources(seed=0)
    assert [list(source.classes) for source in sources.values()] == [["apple", "cattle"], ["dinosaur"], ["bear"]]


def test_wrong_lists_and_layouts(archive, splits, tmp_path, refusal):
    dataset = CifarFs(root=archive, splits=splits)
    (splits / "test.txt").write_text("bear\nunicorn\n")
    assert "novel class unicorn (1 of 2) is not in CIFAR-100" in refusal(dataset)
    (splits / "test.txt").write_text("bear\napple\n")
    assert "class apple is in both base and novel" in refusal(dataset)
    (splits / "test.txt").write_text("filename,label\n")
    assert "test.txt: the line 'filename,label'; expected a class on each line, like aquarium_fish" in refusal(dataset)
    (splits / "test.txt").unlink()
    assert list(dataset.sources(seed=0)) == ["base", "val"]
    assert "nowhere: no such folder or zip; expected cifar-100-python.tar.gz" in refusal(CifarFs(root=tmp_path / "nowhere", splits=splits))
    assert "splits: no folder of any class of the base list; expected cifar-100" in refusal(CifarFs(root=splits, splits=splits))


@pytest.mark.parametrize(("name", "counts"), [("cifar-fs", [64, 16, 20]), ("fc100", [60, 20, 20])])
def test_the_published_lists(real_data, tmp_path, put_images, name, counts):
    folder = real_data / "splits" / name
    every_class = [line for path in folder.iterdir() for line in path.read_text().split()]
    put_images(tmp_path, *(f"{each}/1.png" for each in every_class))
    sources = CifarFs(root=tmp_path, splits=folder).sources(seed=0)
    assert [len(source.classes) for source in sources.values()] == counts
