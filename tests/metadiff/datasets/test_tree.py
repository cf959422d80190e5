import io
import multiprocessing
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metadiff.datasets.tree import IMAGE_SUFFIXES, ZipTree, decode_rgb, open_tree
from metadiff.errors import UserError


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


@pytest.fixture(params=["folder", "zip"])
def tree(request, tmp_path, put_images):
    put_images(tmp_path / "top", "b/2.png", "b/1.JPG", "b/.hidden.png", "a/x.png", ".cache/c.png", "__MACOSX/d.png", "z.png")
    (tmp_path / "top" / "b" / "Thumbs.db").write_text("")
    (tmp_path / "top" / "list.csv").write_text("\ufeffäöü", encoding="utf-8")
    if request.param == "zip":
        shutil.make_archive(str(tmp_path / "top"), "zip", tmp_path / "top")
    return open_tree(tmp_path / ("top.zip" if request.param == "zip" else "top"), "")


def test_folders_and_zips_list_and_read_alike(tree):
    assert tree.folders(tree.root) == ["a", "b"]
    assert tree.files(tree.root) == ["list.csv", "z.png"]
    assert tree.images(f"{tree.root}/b") == [f"{tree.root}/b/1.JPG", f"{tree.root}/b/2.png"]
    assert tree.files(f"{tree.root}/b") == ["1.JPG", "2.png", "Thumbs.db"]
    assert tree.folders(f"{tree.root}/none") == tree.files(f"{tree.root}/none") == tree.folders(f"{tree.root}/z.png") == []
    assert tree.open_image(f"{tree.root}/a/x.png").getpixel((0, 0)) == (3, 3, 3)
    assert tree.text(f"{tree.root}/list.csv") == "äöü"


def test_a_missing_file_is_an_oserror_and_a_missing_text_a_user_error(tree):
    with pytest.raises(OSError, match=r"none\.png"):
        tree.open_image(f"{tree.root}/none.png")
    for name in ("none.csv", "z.png"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read as text"):
            tree.text(f"{tree.root}/{name}")


def test_top_is_the_root_or_the_one_folder_in_it(tmp_path, put_images):
    put_images(tmp_path, "only/base/a/1.png")
    tree = open_tree(tmp_path, "")
    assert tree.top("base/") == f"{tmp_path}/only"
    assert tree.top("only/", "base/") == str(tmp_path)
    assert tree.top("base") is None, "a file is meant, and it is a folder"
    put_images(tmp_path, "other/x.png")
    assert tree.top("base/") is None, "two folders: it is not for the program to choose"


def test_members_need_no_entries_for_their_folders_and_may_start_with_a_dot(tmp_path):
    tree = ZipTree(zipped(tmp_path / "x.zip", {"./a/b/1.png": b"1", "a/c/": b"", "a//2.png": b"2"}))
    assert tree.folders(f"{tree.root}/a") == ["b", "c"]
    assert tree.read(f"{tree.root}/a/b/1.png") == b"1"
    assert tree.read(f"{tree.root}/a/2.png") == b"2"


@pytest.mark.parametrize("member", ["../x.png", "a/../../x.png", "/etc/x.png", "C:/x.png", "..\\x.png", "\\x.png", "a\\..\\..\\x.png"])
def test_a_zip_whose_members_climb_out_is_refused_by_name(tmp_path, member):
    path = zipped(tmp_path / "x.zip", {"a/1.png": b"", member: b""})
    with pytest.raises(UserError, match=r"x\.zip: refused, its member .*x\.png' would be unpacked outside"):
        open_tree(path, "")


def test_names_with_dots_do_not_climb(tmp_path):
    assert ZipTree(zipped(tmp_path / "x.zip", {"a..b/..c.png": b"1"})).read(f"{tmp_path}/x.zip/a..b/..c.png") == b"1"


@pytest.mark.parametrize("keep", [0, 50, -10])
def test_a_zip_cut_short_is_refused(tmp_path, keep):
    path = zipped(tmp_path / "x.zip", {f"{i}.png": bytes(100) for i in range(5)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"x\.zip: not a readable zip .* fetch it again"):
        open_tree(path, "")


def test_a_damaged_member_is_an_oserror_that_names_it(tmp_path):
    path = zipped(tmp_path / "x.zip", {"1.png": b"some content"})
    path.write_bytes(path.read_bytes().replace(b"some", b"same"))
    with pytest.raises(OSError, match=r"x\.zip/1\.png: cannot be read from the zip .*CRC"):
        ZipTree(path).open_image(f"{path}/1.png")


def test_roots_that_are_no_folder_or_zip(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"none: no such folder or zip; expected this$"):
        open_tree(tmp_path / "none", "expected this")
    with pytest.raises(UserError, match=r"x\.tar: neither a folder nor a \.zip; expected this$"):
        open_tree(tmp_path / "x.tar", "expected this")


def member_of(tree: ZipTree, name: str) -> bytes:
    return tree.read(f"{tree.root}/{name}")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_zip_can_be_pickled_and_read_from_forked_processes_at_once(tmp_path):
    contents = {str(i): bytes([i]) * 100_000 for i in range(100)}
    tree = ZipTree(zipped(tmp_path / "x.zip", contents))
    assert member_of(pickle.loads(pickle.dumps(tree)), "7") == contents["7"]
    readers = [multiprocessing.get_context("fork").Process(target=read_all, args=(tree, contents)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0] * 4


def read_all(tree: ZipTree, contents: dict[str, bytes]) -> None:
    for _ in range(5):
        for name, content in contents.items():
            assert member_of(tree, name) == content


FORMS = {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM", "bmp": "BMP", "gif": "GIF", "png": "PNG", "webp": "WEBP"}


@pytest.mark.parametrize("suffix", FORMS)
def test_every_format_is_decoded_as_rgb_and_its_beginning_is_an_oserror(suffix):
    assert f".{suffix}" in IMAGE_SUFFIXES
    red = Image.new("RGB", (40, 30), (250, 4, 4))
    red.paste((4, 4, 250), (0, 15, 40, 30))
    content = encoded(red, FORMS[suffix])
    image = decode_rgb(content, "x")
    assert (image.mode, image.size) == ("RGB", (40, 30))
    np.testing.assert_allclose(np.asarray(image)[[2, 27]].mean(1), [[250, 4, 4], [4, 4, 250]], atol=4)
    with pytest.raises(OSError, match=r"^where: not a readable image"):
        decode_rgb(content[: len(content) // 2], "where")


def test_text_named_like_an_image_is_an_oserror():
    with pytest.raises(OSError, match=r"^where: not a readable image"):
        decode_rgb(b"this is not an image", "where")


def test_other_pixel_modes():
    assert decode_rgb(encoded(Image.new("1", (3, 3), 1), "PNG"), "x").getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), "x").getpixel((0, 0)) == (255, 0, 0)
    assert decode_rgb(encoded(Image.new("RGBA", (3, 3), (9, 8, 7, 0)), "PNG"), "x").getpixel((0, 0)) == (9, 8, 7)
    palette = Image.new("RGB", (3, 3), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode_rgb(encoded(palette, "PNG", transparency=bytes([0, 128])), "x").getpixel((0, 0)) == (9, 8, 7)


def test_sixteen_bits_keep_their_grey_and_thirty_two_are_refused():
    ramp = Image.fromarray(np.array([[0, 256, 128 * 256, 65535]], np.uint16))
    assert np.asarray(decode_rgb(encoded(ramp, "PNG"), "x"))[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(OSError, match="32 bits"):
        decode_rgb(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "x")
