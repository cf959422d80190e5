"""Glyphs: a data set made on the spot, from the letters of many scripts in the font files that matplotlib ships.

A class is a letter; an image is that letter in one of the faces that have it, distorted, coloured, crowded by other letters, noisy and
blurred. The scripts of base, validation and novel classes are disjoint: novel letters come from alphabets that training never saw.
"""

# ruff: noqa: RUF001 -- letters that look like Latin ones are the subject here

import functools
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pydantic import Field

from metadiff.config import config
from metadiff.datasets.source import SPLITS, ImageSource
from metadiff.errors import UserError

# Spelled out rather than searched for in the fonts, so that the classes stay the same whatever versions of the fonts and of FreeType are
# installed. No accented letters; and of letters that are drawn alike (o and O, Latin A and Greek Alpha) only one: the stencils of two
# letters correlate below 0.93 in every face that has both, and those of letters in two splits below 0.95 in any two faces.
SCRIPTS = {
    "base": {
        "Latin": "ABEGJKLMNQRTUYabcdfgikmnopqrstvwxyzßæþŋƄƏƕƖƦƨƩƪƱƹǂǃɐɔɘɣɮɶʁʇʉʎʒʔʖʞʬᴖᴗᴝᴟᵷⱶꜦꜧꞌꞍ",
        "Greek": "ΔΞΨΩβζλξςωϗϙϝϞϟϠϡϻ",
        "Cyrillic": "ЂЄЉЊЋЏДЖИЛЩЪЫЮЯѣѤѪѬѰҡӋԔꙔꙖꙗ",
        "Coptic": "ϢϣϦϧϨϪϮ",
        "Old Italic": "𐌂𐌄𐌅𐌆𐌊𐌋𐌌𐌍𐌎𐌐𐌔𐌕𐌖𐌙𐌚𐌛𐌝",
        "Lisu": "ꓒꓕꓘꓙꓝꓞꓤꓧꓨꓶ",
        "Tifinagh": "ⴳⴻⴼⴽⴾⴿⵁⵃⵄⵅⵆⵇⵈⵌⵎⵐⵒⵓⵕⵖⵗⵘⵙⵛⵜⵢⵣⵤ",
        "Canadian Aboriginal": "ᐁᐅᐫᐬᐭᐳᐸᑨᑩᑪᒉᒋᒐᓂᓄᓇᓕᓗᓭᓯᔐᔓᔕᔦᔪᔭᕆᕈᕋᕗᕙᕠᕦᕿᖁᖅᖏᖓᖕᖖᖢᖤ",
    },
    "val": {
        "Armenian": "ԴԵԶԷԸԹԾԿՀՁՆՇՉՊՋՎՒՔՖըխձճնչպջվփֆ",
        "Hebrew": "אבהזלנעףץצקש",
    },
    "novel": {
        "Georgian": "ႠႣႦႧႪႬႰႴႸႽႿჁჃაელორფშცჭჰჴჷⴀⴂⴄⴆⴉⴍⴐⴓⴕⴙⴜⴟⴡⴣⴥ",
        "Arabic": "ءةتجدرزشعغقلمهيکگۋ",
        "Lao": "ຂຄຈຊຕຖທນປຜພລສຮ",
        "Nko": "ߍߑߔߗߘߝߟߤ",
    },
}
# The last-resort face draws a box for every code point; the size variants and Computer Modern keep letters under other letters' codes.
FACES = tuple(
    f"{family}{style}.ttf"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
        "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
        "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    }.items()
    for style in styles
)
FONT_SIZE_PX = 96
FILL = 0.66  # the longer side of a letter, as a share of its stencil's: the rest is room to turn
NEIGHBOURS = ((-0.6, 0.0), (0.6, 0.0), (0.0, -0.6), (0.0, 0.6))  # in image sides from the centre: they reach into the image
# At most: turn (radians), shear (slope), width and height (log-scale), right and down (image sides), weight (coverage).
DISTORTION = np.array([0.5, 0.4, 0.4, 0.4, 0.12, 0.12, 0.15])


@config
class Glyphs:
    """Letters of 14 scripts, drawn from a seed: nothing to download.

    Attributes:
        images_per_class: images of each letter; its faces take turns.
        image_size: side of the images in pixels.
        num_classes: at most so many classes in each split, spread over its scripts; all of them if not given.
        difficulty: scales distortion, crowding, noise and blur; 0 is a clean, upright, centred letter on a plain ground.
    """

    kind: Literal["glyphs"] = "glyphs"
    images_per_class: Annotated[int, Field(gt=0)] = 60
    image_size: Annotated[int, Field(ge=16, le=256)] = 32
    num_classes: Annotated[int, Field(gt=0)] | None = None
    difficulty: Annotated[float, Field(ge=0, le=2)] = 1.0

    def sources(self, seed: int) -> dict[str, ImageSource]:
        """The images of base, val and novel; image i of a split depends on (`seed`, split, i) alone. `seed` is below 2^64.

        Raises:
            UserError: matplotlib's fonts are not installed.
        """
        return {split: self._source(split, seed) for split in SPLITS}

    def _source(self, split: str, seed: int) -> ImageSource:
        letters = {f"{script}/{ord(x):04X} {unicodedata.name(x)}": x for script, text in SCRIPTS[split].items() for x in text}
        classes = sorted(letters)
        if self.num_classes is not None and self.num_classes < len(classes):
            classes = [classes[i * len(classes) // self.num_classes] for i in range(self.num_classes)]
        drawing = Drawing(tuple(letters[name] for name in classes), SPLITS.index(split), seed, self)
        labels = np.repeat(np.arange(len(classes)), self.images_per_class)
        names = [f"{classes[label]} in {drawing.look(i)[1]}, image {i} of {split}" for i, label in enumerate(labels.tolist())]
        return ImageSource(classes, labels, names, drawing)


@dataclass(frozen=True)
class Drawing:
    """Draws the images of one split. An object rather than a closure, so that it can be sent to another process."""

    letters: tuple[str, ...]
    split_index: int
    seed: int
    config: Glyphs

    def __call__(self, i: int) -> Image.Image:
        """Image i: a square RGB image, the same in every process."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, len(SPLITS) * i + self.split_index], np.uint64)))
        difficulty = self.config.difficulty
        ground, ink, clutter = _colours(rng)
        image = self._wash(ground, rng)
        sides = rng.permutation(4)[: rng.binomial(4, min(1.0, 0.6 * difficulty))]
        for side in sides.tolist():
            neighbour = int(rng.integers(len(self.letters) * self.config.images_per_class))
            image += self._stamp(neighbour, NEIGHBOURS[side], rng) * (clutter - image)
        image += self._stamp(i, (0.0, 0.0), rng) * (self._wash(ink, rng) - image)
        return _photograph(image, rng, difficulty)

    def look(self, i: int) -> tuple[str, str]:
        """The letter of image i and the face it is drawn in."""
        label, turn = divmod(i, self.config.images_per_class)
        faces = faces_of(self.letters[label])
        return self.letters[label], faces[turn % len(faces)]

    def _stamp(self, i: int, offset: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
        """Image i's letter turned, sheared, stretched, moved and thickened or thinned: (size, size, 1) coverage in [0, 1]."""
        size, difficulty = self.config.image_size, self.config.difficulty
        shape = stencil(*self.look(i), 2 * size)
        turn, shear, log_width, log_height, right, down, weight = rng.uniform(-1, 1, 7) * difficulty * DISTORTION
        cos, sin = np.cos(turn), np.sin(turn)
        stretch = np.array([[np.exp(log_width), shear], [0, np.exp(log_height)]])
        to_stencil = 2 * np.array([[cos, sin], [-sin, cos]]) @ stretch
        corner = size - to_stencil @ (size * np.array([0.5 + offset[0] + right, 0.5 + offset[1] + down]))
        affine = (*to_stencil[0], corner[0], *to_stencil[1], corner[1])
        soft = np.asarray(shape.transform((size, size), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR), np.float32)
        return np.clip(soft * (4 / 255) - np.float32(0.9 + 4 * weight), 0, 1)[..., None]

    def _wash(self, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`colour` with a gradient: (size, size, 3)."""
        down, across = rng.uniform(-0.25, 0.25, (2, 3)).astype(np.float32) * np.float32(self.config.difficulty)
        ramp = _ramp(self.config.image_size)
        return (colour + ramp * down)[:, None] + ramp * across


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Ground, letter and clutter, (3, 3) around [0, 1]: dark on light or light on dark, with the clutter's lightness in between."""
    dark, light = rng.uniform(0.1, 0.4), rng.uniform(0.6, 0.9)
    ground, letter = (light, dark) if rng.random() < 0.5 else (dark, light)
    lightness = np.array([ground, letter, ground + rng.uniform(0.2, 0.8) * (letter - ground)])
    return (lightness[:, None] + rng.uniform(-0.25, 0.25, (3, 3))).astype(np.float32)


def _photograph(image: np.ndarray, rng: np.random.Generator, difficulty: float) -> Image.Image:
    """Noise, then blur."""
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(0.15 * difficulty * rng.random())
    shot = Image.fromarray((np.clip(image + noise, 0, 1) * 255 + 0.5).astype(np.uint8))
    return shot.filter(ImageFilter.GaussianBlur(0.8 * difficulty * rng.random()))


@functools.cache
def _ramp(size: int) -> np.ndarray:
    return np.linspace(-1, 1, size, dtype=np.float32)[:, None]


@functools.lru_cache(maxsize=8192)
def stencil(letter: str, face: str, size: int) -> Image.Image:
    """`letter` in `face`, its longer side `FILL` of the stencil's, slightly blurred: (size, size) coverage, 0 to 255.

    The blur leaves a slope beside every edge: cutting it off higher or lower makes the stroke finer or bolder.
    """
    left, top, right, bottom = (int(x) for x in _font(face).getbbox(letter))
    sheet = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(sheet).text((-left, -top), letter, fill=255, font=_font(face))
    scale = FILL * size / max(sheet.size)
    width, height = (max(1, round(scale * side)) for side in sheet.size)
    centred = Image.new("L", (size, size))
    centred.paste(sheet.resize((width, height), Image.Resampling.BILINEAR), ((size - width) // 2, (size - height) // 2))
    return centred.filter(ImageFilter.GaussianBlur(size / 48))


@functools.cache
def faces_of(letter: str) -> tuple[str, ...]:
    """The faces that hold `letter`, by file name.

    Raises:
        UserError: matplotlib's fonts are not installed.
    """
    return tuple(face for face in FACES if ord(letter) in _code_points(face))


@functools.cache
def _code_points(face: str) -> frozenset[int]:
    with TTFont(_path(face), lazy=True) as font:
        return frozenset(font["cmap"].getBestCmap() or ())


@functools.cache
def _font(face: str) -> ImageFont.FreeTypeFont:
    # The basic layout looks a letter up as it is, whether or not Pillow was built with its shaping library.
    return ImageFont.truetype(str(_path(face)), FONT_SIZE_PX, layout_engine=ImageFont.Layout.BASIC)


def _path(face: str) -> Path:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", face)
    if not path.is_file():
        raise UserError(f"dataset glyphs: no font {path}; install matplotlib from PyPI (some system packages ship it without fonts)")
    return path
