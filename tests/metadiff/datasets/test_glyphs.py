"""The embedded data set: what it holds, that it can be told apart, and that it is drawn the same everywhere."""

import pickle
import subprocess
import sys
from hashlib import sha256

import matplotlib
import numpy as np
import pytest
from PIL import Image

from metadiff.config import validate
from metadiff.datasets import glyphs
from metadiff.datasets.glyphs import FACES, SCRIPTS, Glyphs, faces_of, stencil
from metadiff.datasets.source import SPLITS
from metadiff.errors import UserError

SOURCES = Glyphs().sources(seed=0)
LETTERS = [letter for scripts in SCRIPTS.values() for text in scripts.values() for letter in text]
DIGESTS = """
from hashlib import sha256
from metadiff.datasets.glyphs import Glyphs
print(*(sha256(source.open(i).tobytes()).hexdigest() for source in Glyphs().sources(3).values() for i in (0, 77, 2000)))
"""


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float32)


def unit(letter: str, face: str) -> np.ndarray:
    """The stencil as a centred unit vector, so that a product of two is their correlation."""
    shape = pixels(stencil(letter, face, 32)).ravel()
    return (shape - shape.mean()) / np.linalg.norm(shape - shape.mean())


@pytest.fixture(scope="module")
def units() -> dict[str, dict[str, np.ndarray]]:
    return {letter: {face: unit(letter, face) for face in faces_of(letter)} for letter in LETTERS}


def test_counts() -> None:
    assert {split: len(source.classes) for split, source in SOURCES.items()} == {"base": 224, "val": 42, "novel": 80}
    assert {split: len(source) for split, source in SOURCES.items()} == {"base": 13440, "val": 2520, "novel": 4800}
    for source in SOURCES.values():
        assert np.array_equal(np.bincount(source.labels), np.full(len(source.classes), 60))
        assert source.labels.dtype == np.int64
        assert list(source.classes) == sorted(set(source.classes))
        assert len(set(source.names)) == len(source)


def test_names_tell_letter_and_face() -> None:
    novel = SOURCES["novel"]
    assert novel.classes[0] == "Arabic/0621 ARABIC LETTER HAMZA"
    assert novel.names[1] == "Arabic/0621 ARABIC LETTER HAMZA in DejaVuSans-Bold.ttf, image 1 of novel"


def test_images_are_square_rgb_and_not_blank() -> None:
    for source in SOURCES.values():
        for i in range(0, len(source), 97):
            image = source.open(i)
            assert (image.mode, image.size) == ("RGB", (32, 32))
            assert pixels(image).std() > 10
    assert Glyphs(image_size=84).sources(0)["val"].open(5).size == (84, 84)


def test_splits_share_no_script_and_no_letter() -> None:
    scripts = [script for split in SPLITS for script in SCRIPTS[split]]
    assert len(scripts) == len(set(scripts)) == 14
    assert len(LETTERS) == len(set(LETTERS)) == 346


def test_every_letter_has_several_faces() -> None:
    assert min(len(faces_of(letter)) for letter in LETTERS) >= 2
    assert np.mean([len(faces_of(letter)) for letter in LETTERS]) > 7
    drawn = {name.split(" in ")[1].split(",")[0] for name in SOURCES["base"].names}
    assert drawn == set(FACES)


def test_no_letter_is_the_box_of_a_missing_one(units: dict[str, dict[str, np.ndarray]]) -> None:
    unassigned = "\U000effff"
    assert faces_of(unassigned) == ()
    # STIX leaves a missing letter blank, and `unit` would have divided by zero for one.
    boxes = {face: unit(unassigned, face) for face in FACES if face.startswith("DejaVu")}
    assert max(float(shape @ boxes[face]) for shapes in units.values() for face, shape in shapes.items() if face in boxes) < 0.9


def test_no_two_letters_look_alike_in_a_face(units: dict[str, dict[str, np.ndarray]]) -> None:
    for face in FACES:
        shapes = np.stack([shapes[face] for shapes in units.values() if face in shapes])
        assert np.triu(shapes @ shapes.T, 1).max() < 0.93


def test_no_letter_looks_like_one_of_another_split_in_any_face(units: dict[str, dict[str, np.ndarray]]) -> None:
    base, val, novel = (
        np.stack([shape for text in SCRIPTS[split].values() for letter in text for shape in units[letter].values()]) for split in SPLITS
    )
    assert max((base @ val.T).max(), (base @ novel.T).max(), (val @ novel.T).max()) < 0.95


def test_images_do_not_depend_on_the_order_of_opening() -> None:
    forwards = [SOURCES["novel"].open(i).tobytes() for i in range(40)]
    stencil.cache_clear()
    again = Glyphs().sources(seed=0)["novel"]
    assert [again.open(i).tobytes() for i in reversed(range(40))] == forwards[::-1]


def test_another_process_draws_the_same_bytes() -> None:
    other = subprocess.run([sys.executable, "-c", DIGESTS], capture_output=True, text=True, check=True).stdout.split()
    mine = [sha256(source.open(i).tobytes()).hexdigest() for source in Glyphs().sources(3).values() for i in (0, 77, 2000)]
    assert mine == other


def test_a_source_can_be_sent_to_another_process() -> None:
    copy = pickle.loads(pickle.dumps(SOURCES["val"]))
    assert copy.open(9).tobytes() == SOURCES["val"].open(9).tobytes()


def test_seeds_splits_and_images_have_streams_of_their_own() -> None:
    def ground(seed: int, split: str, i: int) -> tuple[int, ...]:
        return tuple(np.asarray(Glyphs(difficulty=0).sources(seed)[split].open(i))[0, 0].tolist())

    assert len({ground(seed, split, i) for seed in (0, 1) for split in SPLITS for i in (0, 1, 16)}) == 18


def test_difficulty_zero_is_the_letter_upright_and_plain() -> None:
    image = pixels(Glyphs(difficulty=0).sources(0)["base"].open(0)).mean(axis=2)
    canadian_e = pixels(stencil("\u1401", "DejaVuSans.ttf", 32))
    assert abs(np.corrcoef(image.ravel(), canadian_e.ravel())[0, 1]) > 0.95
    assert image[0].std() == 0


def test_num_classes_takes_letters_of_all_scripts() -> None:
    source = Glyphs(num_classes=20, images_per_class=3).sources(0)["novel"]
    assert (len(source.classes), len(source)) == (20, 60)
    assert {name.split("/")[0] for name in source.classes} == set(SCRIPTS["novel"])
    assert len(Glyphs(num_classes=1000).sources(0)["novel"].classes) == 80


@pytest.mark.parametrize("wrong", [{"images_per_class": 0}, {"image_size": 8}, {"num_classes": 0}, {"difficulty": -1}, {"difficulty": 3}])
def test_impossible_options_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        validate(Glyphs, wrong, "here")


def test_missing_fonts_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for cache in (faces_of, glyphs._code_points):
        monkeypatch.setattr(glyphs, cache.__name__, cache.__wrapped__)
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"DejaVuSans\.ttf; install matplotlib from PyPI"):
        Glyphs().sources(0)
