import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from torchvision.datasets import Omniglot as Published

from metadiff.datasets.omniglot import Omniglot
from metadiff.datasets.source import ImageSource

BACKGROUND = [f"images_background/{alphabet}/character0{n}/{i}.png" for alphabet in "ABCDEF" for n in (1, 2) for i in (1, 2, 3)]
EVALUATION = [f"images_evaluation/{alphabet}/character01/{i}.png" for alphabet in "XY" for i in (1, 2, 3)]


@pytest.fixture
def unpacked(tmp_path, put_images) -> Path:
    put_images(tmp_path / "omniglot", *BACKGROUND, *EVALUATION)
    return tmp_path / "omniglot"


def pack(folder: Path, part: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.make_archive(str(path.with_suffix("")), "zip", folder, part)


def alphabets(source: ImageSource) -> set[str]:
    return {name.split("/")[0] for name in source.classes}


@pytest.mark.parametrize("form", ["{}", "omniglot-py/{}", "{}.zip", "omniglot-{}.zip", "omniglot-py/{}.zip"])
def test_every_layout_reads_alike(unpacked, tmp_path, form):
    root = tmp_path / "root"
    for part in ("images_background", "images_evaluation"):
        if form.endswith(".zip"):
            pack(unpacked, part, root / form.format(part))
        else:
            shutil.copytree(unpacked / part, root / form.format(part))
    sources = Omniglot(root=root, val_alphabets=2).sources(seed=0)
    assert {split: (len(source.classes), len(source)) for split, source in sources.items()} == {
        "base": (8, 24),
        "val": (4, 12),
        "novel": (2, 6),
    }
    assert list(sources["novel"].classes) == ["X/character01", "Y/character01"]
    assert sources["novel"].open(4).getpixel((0, 0)) == (40, 40, 40)
    assert sources["novel"].names[4].endswith("images_evaluation/Y/character01/2.png")


def test_the_seed_draws_the_alphabets_of_val(unpacked):
    drawn = [Omniglot(root=unpacked, val_alphabets=2).sources(seed) for seed in (0, 0, 1, 2, 3)]
    assert all(alphabets(sources["base"]) | alphabets(sources["val"]) == set("ABCDEF") for sources in drawn)
    assert all(not alphabets(sources["base"]) & alphabets(sources["val"]) for sources in drawn)
    assert alphabets(drawn[0]["val"]) == alphabets(drawn[1]["val"])
    assert len({frozenset(alphabets(sources["val"])) for sources in drawn}) > 1


def test_no_alphabets_for_val_and_no_evaluation_set(unpacked):
    shutil.rmtree(unpacked / "images_evaluation")
    assert list(Omniglot(root=unpacked, val_alphabets=0).sources(seed=0)) == ["base"]


def test_rotations_are_classes_of_their_own(unpacked):
    corner = Image.new("1", (105, 105), 1)
    corner.putpixel((0, 0), 0)
    corner.save(unpacked / "images_evaluation/X/character01/1.png")
    sources = Omniglot(root=unpacked, val_alphabets=2, rotations=True).sources(seed=0)
    assert [len(source.classes) for source in sources.values()] == [32, 16, 8]
    novel = sources["novel"]
    assert list(novel.classes[:4]) == ["X/character01", "X/character01/rot180", "X/character01/rot270", "X/character01/rot90"]
    where_black = {novel.classes[novel.labels[i]]: np.argwhere(np.asarray(novel.open(i))[..., 0] == 0).tolist() for i in (0, 3, 6, 9)}
    assert where_black == {
        "X/character01": [[0, 0]],
        "X/character01/rot90": [[104, 0]],
        "X/character01/rot180": [[104, 104]],
        "X/character01/rot270": [[0, 104]],
    }
    assert novel.names[9] == f"{unpacked}/images_evaluation/X/character01/1.png turned by 90 degrees"


def test_wrong_layouts(tmp_path, unpacked, refusal):
    assert "none: no such folder; expected images_background.zip" in refusal(Omniglot(root=tmp_path / "none"))
    (tmp_path / "file").write_text("")
    assert "file: not a folder; expected images_background.zip" in refusal(Omniglot(root=tmp_path / "file", download=True))
    assert f"{tmp_path}: no images_background.zip nor images_background/ in it; expected" in refusal(Omniglot(root=tmp_path))
    assert "val_alphabets=6: expected fewer than the 6 background alphabets" in refusal(Omniglot(root=unpacked, val_alphabets=6))
    with pytest.raises(ValidationError, match="less than 30"):
        Omniglot(root=unpacked, val_alphabets=30)
    (unpacked / "images_background/A/empty").mkdir()
    assert "images_background/A/empty: a class folder without images" in refusal(Omniglot(root=unpacked))


def test_wrong_zips(tmp_path, refusal):
    path = tmp_path / "images_background.zip"
    path.write_bytes(b"PK half of a download")
    assert "images_background.zip: not a readable zip" in refusal(Omniglot(root=tmp_path))
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("strokes_background/A/1.txt", "")
    assert "images_background.zip: no images_background/ in it; expected" in refusal(Omniglot(root=tmp_path))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("../evil.png", "")
    assert "refused, its member '../evil.png'" in refusal(Omniglot(root=tmp_path))


@pytest.fixture
def server(unpacked, tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a download server on this machine."""
    folder = tmp_path / "server"
    sums = {}
    for part in Published.zips_md5:
        pack(unpacked, part, folder / f"{part}.zip")
        sums[part] = hashlib.md5((folder / f"{part}.zip").read_bytes()).hexdigest()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder)) as http:
        Thread(target=http.serve_forever, args=(0.01,)).start()
        monkeypatch.setattr(Published, "download_url_prefix", f"http://127.0.0.1:{http.server_port}")
        monkeypatch.setattr(Published, "zips_md5", sums)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        http.shutdown()


def test_download_fetches_what_is_not_there(server, tmp_path):
    root = tmp_path / "new/root"
    dataset = Omniglot(root=root, download=True)
    assert list(dataset.sources(seed=0)) == ["base", "val", "novel"]
    assert sorted(path.name for path in root.iterdir()) == ["images_background.zip", "images_evaluation.zip"]
    shutil.rmtree(server)
    assert list(dataset.sources(seed=0)) == ["base", "val", "novel"]


def test_a_failed_download_leaves_no_file(server, tmp_path, refusal, monkeypatch):
    dataset = Omniglot(root=tmp_path / "root", download=True)
    (server / "images_background.zip").write_bytes(b"something else")
    assert "images_background.zip: download failed (File not found or corrupted.); check the network" in refusal(dataset)
    monkeypatch.setattr(Published, "download_url_prefix", "http://127.0.0.1:1")
    assert "images_background.zip: download failed (<urlopen error" in refusal(dataset)
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("rotations", [False, True])
def test_the_real_data(real_data, rotations):
    sources = Omniglot(root=real_data, rotations=rotations).sources(seed=0)
    copies = 4 if rotations else 1
    assert len(sources["base"].classes) + len(sources["val"].classes) == 964 * copies
    assert len(sources["novel"].classes) == 659 * copies
    assert [len(alphabets(source)) for source in sources.values()] == [25, 5, 20]
    assert all((np.bincount(source.labels) == 20).all() for source in sources.values())
    image = sources["val"].open(0)
    assert (image.mode, image.size) == ("RGB", (105, 105))
    assert np.asarray(image).mean() > 200, "black strokes on white"
