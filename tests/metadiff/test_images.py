import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metadiff.artifact import commit, workspace
from metadiff.datasets.source import ImageSource, by_class
from metadiff.datasets.tree import decode_rgb
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, ImageSet, MemoryLoader, PrepareConfig, batches_in_order, fit_to_square, normalise, write_split

SIZE = 16
PLAIN = AugmentConfig(crop="none", flip=False)
SMALL = PrepareConfig(image_size=SIZE)
SKIP = PrepareConfig(image_size=SIZE, skip_bad_images=True)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(shade: int, size: tuple[int, int] = (20, 18)) -> bytes:
    return encoded(Image.new("RGB", size, (shade, shade, shade)))


def source_of(folder: Path, files: Mapping[str, Mapping[str, bytes]]) -> ImageSource:
    """Image files on disk (class name, file name, content) as a data set hands them over."""
    listed: dict[str, list[Path]] = {}
    for name, contents in files.items():
        (folder / name).mkdir(parents=True)
        listed[name] = [folder / name / file for file in contents]
        for path, content in zip(listed[name], contents.values(), strict=True):
            path.write_bytes(content)
    return by_class(listed, lambda path: decode_rgb(path.read_bytes(), str(path)))


def prepared(folder: Path, source: ImageSource, settings: PrepareConfig = SMALL) -> ImageSet:
    partial = workspace(folder / "prepare", "prepare", {}, {})
    write_split(partial, "base", source, settings)
    return ImageSet.open(commit(partial, folder / "prepare", "prepare", {}, {}, 0.0), "base")


def refusal(folder: Path, source: ImageSource, settings: PrepareConfig = SMALL) -> str:
    """The one line with which the source is refused."""
    with pytest.raises(UserError) as caught:
        write_split(folder, "base", source, settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_are_sorted_by_class_and_keep_their_order_within(tmp_path: Path) -> None:
    shades = np.array([50, 10, 20, 60, 30, 40], np.uint8)
    labels, names = np.array([2, 0, 0, 2, 1, 1]), [f"{shade}.png" for shade in shades]
    source = ImageSource(["a", "b", "c"], labels, names, lambda index: Image.new("RGB", (20, 18), (int(shades[index]),) * 3))
    images = prepared(tmp_path, source)
    assert images.images.shape == (6, SIZE, SIZE, 3)
    assert images.images.dtype == np.uint8
    assert isinstance(images.images, np.memmap)
    assert images.images[:, 3, 4, 0].tolist() == [10, 20, 30, 40, 50, 60]
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.labels.dtype == np.int64
    assert images.offsets.tolist() == [0, 2, 4, 6]
    assert images.classes == ("a", "b", "c")


def test_head_keeps_the_first_of_every_class() -> None:
    images = ImageSet(np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), np.array([0, 0, 0, 1, 2, 2]), ("a", "b", "c"))
    head = images.head(2)
    assert head.images.ravel().tolist() == [0, 1, 3, 4, 5]
    assert head.offsets.tolist() == [0, 2, 3, 5]


def test_a_split_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    partial = workspace(tmp_path / "prepare", "prepare", {}, {})
    write_split(partial, "base", source_of(tmp_path / "data", {"cat": {"1.png": grey(1)}}), SMALL)
    with pytest.raises(UserError, match=r"split 'novel': not in .*/prepare, which has base; give the data set that split"):
        ImageSet.open(commit(partial, tmp_path / "prepare", "prepare", {}, {}, 0.0), "novel")


BAD = {
    "text.jpg": b"no image at all\n",
    "empty.jpg": b"",
    "cut.png": encoded(Image.radial_gradient("L").convert("RGB"))[:900],
    "cut.jpg": encoded(Image.radial_gradient("L").convert("RGB"), "JPEG")[:900],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_listed_by_name(tmp_path: Path, name: str) -> None:
    source = source_of(tmp_path / "data", {"cat": {"1.png": grey(1), name: BAD[name]}, "dog": {"2.png": grey(2)}})
    message = refusal(tmp_path, source)
    assert message.startswith(f"base: not readable as images: {tmp_path}/data/cat/{name} (")
    assert "1.png" not in message
    assert message.endswith("mend or delete them, or set prepare.skip_bad_images=true")


def test_only_the_first_bad_images_are_listed(tmp_path: Path) -> None:
    source = source_of(tmp_path / "data", {"cat": {"1.png": grey(1), **{f"bad{index}.png": b"x" for index in range(5)}}})
    assert "bad2.png" in refusal(tmp_path, source)
    assert "bad3.png" not in refusal(tmp_path, source)
    assert " and 2 more;" in refusal(tmp_path, source)


def test_skip_bad_images_leaves_them_out_and_lists_them(tmp_path: Path) -> None:
    cat = {"1.png": grey(10), **BAD, "3.png": grey(30)}
    images = prepared(tmp_path, source_of(tmp_path / "data", {"dog": {"4.png": grey(40)}, "cat": cat}), SKIP)
    assert images.images[:, 0, 0, 0].tolist() == [10, 30, 40]
    assert images.labels.tolist() == [0, 0, 1]
    listed = (tmp_path / "prepare" / "base.skipped.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in listed] == [f"{tmp_path}/data/cat/{name}" for name in BAD]
    files = json.loads((tmp_path / "prepare" / "manifest.json").read_text())["files"]
    assert sorted(files) == ["base.classes.json", "base.images.npy", "base.labels.npy", "base.skipped.txt"]


@pytest.mark.parametrize("others", [{"dog": {"1.png": grey(1)}}, {}])
def test_a_class_left_empty_is_a_user_error(tmp_path: Path, others: dict[str, dict[str, bytes]]) -> None:
    source = source_of(tmp_path / "data", {"cat": {"text.jpg": BAD["text.jpg"]}, **others})
    assert refusal(tmp_path, source, SKIP) == "base: class 'cat' has no readable image left; mend its images or delete the class"
    assert not (tmp_path / "base.classes.json").exists()


def sideways(kind: str, **options: Any) -> bytes:
    """Red above blue, stored turned by a quarter as cameras do it."""
    image = Image.new("RGB", (32, 32), "blue")
    image.paste("red", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.rotate(90), kind, exif=exif, **options)


def channels(image: np.ndarray, row: int, column: int) -> list[int]:
    return image[row, column].tolist()


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("L", (30, 20), 90)),
        encoded(Image.new("LA", (20, 30), (90, 7))),
        encoded(Image.new("RGBA", (20, 30), (90, 90, 90, 0))),
        encoded(Image.new("CMYK", (30, 30), (165, 165, 165, 0)), "TIFF"),
        encoded(Image.new("L", (30, 20), 90).convert("P")),
        encoded(Image.new("L", (30, 20), 90).convert("P"), transparency=3),
        encoded(Image.fromarray(np.full((20, 30), 90 << 8, np.uint16))),
        encoded(Image.new("L", (30, 20), 90), "GIF"),
        encoded(Image.new("RGB", (3, 40), (90, 90, 90)), "BMP"),
    ],
    ids=["grey", "grey and alpha", "alpha", "cmyk", "palette", "palette and transparency", "16 bits", "gif", "narrow"],
)
def test_any_image_becomes_an_rgb_square(content: bytes) -> None:
    image = fit_to_square(decode_rgb(content, "it"), SIZE)
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert (image == 90).all()


def test_bits_become_black_and_white() -> None:
    image = fit_to_square(decode_rgb(encoded(Image.new("1", (9, 9), 1)), "it"), SIZE)
    assert (image == 255).all()


@pytest.mark.parametrize(
    "content", [sideways("PNG"), sideways("JPEG", quality=100, subsampling=0), sideways("WEBP", lossless=True)], ids=["png", "jpeg", "webp"]
)
def test_photographs_are_turned_as_exif_says(content: bytes) -> None:
    image = fit_to_square(decode_rgb(content, "it"), SIZE).astype(int)
    assert np.abs(image[:7] - [255, 0, 0]).max() <= 2
    assert np.abs(image[-7:] - [0, 0, 255]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_exif_spoils_no_image(kind: str) -> None:
    content = encoded(Image.new("RGB", (30, 20), (90, 90, 90)), kind, exif=b"Exif\0\0garbagegarbage")
    assert np.abs(fit_to_square(decode_rgb(content, "it"), SIZE).astype(int) - 90).max() <= 2


def test_the_middle_square_is_kept() -> None:
    image = Image.new("RGB", (3 * SIZE, SIZE), "red")
    image.paste("blue", (SIZE, 0, 2 * SIZE, SIZE))
    assert (fit_to_square(image, SIZE) == [0, 0, 255]).all()


@pytest.fixture
def numbered() -> ImageSet:
    """30 images, each all of its own number, of 3 classes."""
    images = np.broadcast_to(np.arange(30, dtype=np.uint8)[:, None, None, None], (30, SIZE, SIZE, 3)).copy()
    return ImageSet(images, np.repeat(np.arange(3), 10), ("a", "b", "c"))


@pytest.fixture
def noisy() -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3), dtype=np.uint8)
    return ImageSet(images, np.repeat(np.arange(3), 4), ("a", "b", "c"))


def pixels_of(batch: torch.Tensor) -> np.ndarray:
    """(B, H, W, 3) uint8: the inverse of `normalise`."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((batch.permute(0, 2, 3, 1).numpy() * std + mean) * 255).round().astype(np.uint8)


def test_normalisation() -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    pixels[1] = 255
    normal = normalise(pixels)
    assert normal.dtype == torch.float32
    assert normal.is_contiguous(memory_format=torch.channels_last)
    # The figures of every torchvision tutorial: black and white by channel.
    torch.testing.assert_close(normal[0, :, 0, 0], torch.tensor([-2.117904, -2.035714, -1.804444]), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal[1, :, 3, 3], torch.tensor([2.248908, 2.428571, 2.640000]), atol=1e-6, rtol=0)


def test_an_epoch_shows_every_image_at_most_once(numbered: ImageSet) -> None:
    loader = MemoryLoader(numbered, 7, PLAIN, seed=3)
    assert loader.steps_per_epoch == 4
    batches = list(loader.epoch(0))
    assert [tuple(images.shape) for images, _ in batches] == [(7, 3, SIZE, SIZE)] * 4
    shown = [pixels_of(images)[:, 0, 0, 0] for images, _ in batches]
    assert len(set(np.concatenate(shown).tolist())) == 28
    for numbers, (_, labels) in zip(shown, batches, strict=True):
        assert labels.dtype == torch.int64
        assert labels.tolist() == (numbers // 10).tolist()
    assert set(np.concatenate([pixels_of(images)[:, 0, 0, 0] for images, _ in MemoryLoader(numbered, 10, PLAIN, 3).epoch(0)])) == set(
        range(30)
    )


@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
def test_batches_depend_on_seed_epoch_and_step_alone(noisy: ImageSet, crop: Any) -> None:
    augment = AugmentConfig(crop=crop, color_jitter=0.4)
    loader = MemoryLoader(noisy, 4, augment, seed=1)
    torch.manual_seed(11)
    first = [images for images, _ in loader.epoch(2)]
    torch.manual_seed(99)
    list(loader.epoch(1))
    second = [images for images, _ in MemoryLoader(noisy, 4, augment, seed=1).epoch(2)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for other in (loader.epoch(3), MemoryLoader(noisy, 4, augment, seed=2).epoch(2)):
        assert not any(torch.equal(a, b) for a, (b, _) in zip(first, other, strict=True))


def test_order_and_augmentation_each_change_with_epoch_and_seed(noisy: ImageSet) -> None:
    orders = [next(MemoryLoader(noisy, 11, PLAIN, seed).epoch(epoch))[0] for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    shifts = [next(MemoryLoader(noisy, 12, AugmentConfig(), seed).epoch(epoch))[0] for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for images in (orders, shifts):
        assert not any(torch.equal(images[a], images[b]) for a in range(4) for b in range(a))


def test_global_randomness_is_left_alone(noisy: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's global generator was seeded"))
    torch.default_generator.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    for _ in MemoryLoader(noisy, 4, AugmentConfig(color_jitter=0.4), seed=1).epoch(0):
        assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # type: ignore[index]


def test_a_batch_of_more_images_than_there_are_is_a_user_error(noisy: ImageSet) -> None:
    with pytest.raises(UserError, match=r"pretrain.batch_size=13: the base split has only 12 images"):
        MemoryLoader(noisy, 13, PLAIN, seed=0)


def whole_set(images: ImageSet, augment: AugmentConfig) -> np.ndarray:
    """Every image after augmentation, in order."""
    loader = MemoryLoader(images, len(images.labels), augment, seed=0)
    return pixels_of(next(loader.epoch(0))[0])


def test_augmentation_that_is_off_changes_nothing(noisy: ImageSet) -> None:
    assert (whole_set(noisy, PLAIN) == noisy.images).all()


def test_flip_mirrors_about_half_of_the_images(noisy: ImageSet) -> None:
    shown = whole_set(noisy, AugmentConfig(crop="none", flip=True))
    mirrored = [(a == b[:, ::-1]).all() for a, b in zip(shown, noisy.images, strict=True)]
    same = [(a == b).all() for a, b in zip(shown, noisy.images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 2 <= sum(mirrored) <= 10


def test_shift_moves_by_up_to_an_eighth(noisy: ImageSet) -> None:
    reach = SIZE // 8
    shown, found = whole_set(noisy, AugmentConfig(crop="shift", flip=False)), set()
    for image, original in zip(shown, noisy.images, strict=True):
        padded = np.pad(original, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        places = [(y, x) for y in range(2 * reach + 1) for x in range(2 * reach + 1)]
        found |= {(y, x) for y, x in places if (padded[y : y + SIZE, x : x + SIZE] == image).all()}
    assert len(found) > 5


def test_jitter_changes_colours_and_can_be_off(noisy: ImageSet) -> None:
    assert not (whole_set(noisy, AugmentConfig(crop="none", flip=False, color_jitter=0.4)) == noisy.images).all(axis=(1, 2, 3)).any()


def test_batches_in_order(noisy: ImageSet) -> None:
    batches = list(batches_in_order(noisy.images, 5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert (pixels_of(torch.cat(batches)) == noisy.images).all()


def test_memory_mapped_images_are_read_without_warnings(tmp_path: Path) -> None:
    files = {name: {"1.png": grey(shade), "2.png": grey(shade + 1)} for name, shade in (("cat", 10), ("dog", 20))}
    images = prepared(tmp_path, source_of(tmp_path / "data", files))
    assert [pixels_of(batch)[:, 0, 0, 0].tolist() for batch in batches_in_order(images.images, 3)] == [[10, 11, 20], [21]]
    assert len(list(MemoryLoader(images, 2, AugmentConfig(), 0).epoch(0))) == 2
