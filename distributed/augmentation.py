"""Augmentation in one pass: crop, resize, flip, colour jitter and normalisation of uint8 images to float32, compiled by numba.

What is drawn for an image depends on the seed and the number of its showing alone, so that neither threads, workers nor batches change it.
The distributions are those of torchvision's transforms in `metadiff.images.augmentation`.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

from metadiff.episodes import random_keys
from metadiff.images import MEAN, STD, AugmentConfig

_ATTEMPTS = 10
_SCALE, _LOG_RATIO = (0.35, 1.0), (np.log(3 / 4), np.log(4 / 3))
# Uniform numbers of one image: area and ratio of each attempt, top, left, flip, three factors, the order of the three.
_TOP, _LEFT, _FLIP, _FACTOR, _ORDER, _COUNT = 20, 21, 22, 23, 26, 27
_ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
_GREY = (0.2989, 0.587, 0.114)
# Without `fastmath`: sums are rounded the same in every variant that is compiled, with one thread and with several.
_COMPILED: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

Views = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of each image: (B, 4) top, left, height and width of what is shown, (B,) whether it is mirrored, (B, 3) the factors of brightness,
contrast and saturation, (B, 3) the order in which they are applied."""


def draw_views(augment: AugmentConfig, size: int, seed: int, numbers: np.ndarray) -> Views:
    """What is shown of (B,) images of `size` x `size` pixels; `numbers` says the how-manieth showing each is, over all epochs."""
    uniform = (random_keys(seed, "augment", numbers, _COUNT) >> np.uint64(11)) * 2.0**-53
    flip = (uniform[:, _FLIP] < 0.5) & augment.flip
    factors = 1 + augment.color_jitter * (2 * uniform[:, _FACTOR:_ORDER] - 1)
    order = _ORDERS[(uniform[:, _ORDER] * len(_ORDERS)).astype(np.int64)]
    return _BOXES[augment.crop](uniform, size), flip, factors.astype(np.float32), order


def transformer(
    augment: AugmentConfig | None, size: int, seed: int, parallel: bool, pinned: bool = False
) -> Callable[[np.ndarray, np.ndarray], torch.Tensor]:
    """Compile the function from (B, H, H, 3) uint8 images and the (B,) numbers of their showings to (B, 3, H, H) normalised float32.

    Channels are last in memory. Without augmentation the values are those of `metadiff.images.normalise`, bit for bit.
    With `pinned`, a GPU can fetch them while the processor goes on (not run on a GPU yet).
    """
    mean, std = (np.tile((torch.tensor(values) * 255).numpy(), size) for values in (MEAN, STD))
    plain = numba.njit(parallel=parallel, **_COMPILED)(_normalise)
    fused = numba.njit(parallel=parallel, **_COMPILED)(_show)
    changes = augment is not None and (augment.crop != "none" or augment.flip or augment.color_jitter > 0)

    def transform(images: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
        out = torch.empty(len(images), size, size, 3, pin_memory=pinned)
        rows = out.numpy().reshape(len(images), size, 3 * size)
        if not changes:
            plain(images.reshape(rows.shape), mean, std, rows)
        else:
            assert augment is not None
            views = draw_views(augment, size, seed, numbers)
            fused(images.reshape(rows.shape), *views, augment.crop == "shift", augment.color_jitter > 0, mean, std, rows)
        return out.permute(0, 3, 1, 2)

    empty = np.zeros((0, size, size, 3), np.uint8)
    transform(empty, np.zeros(0, np.int64))  # compiles
    return transform


def _whole(uniform: np.ndarray, size: int) -> np.ndarray:
    return np.tile(np.array([0, 0, size, size], np.int64), (len(uniform), 1))


def _shifted(uniform: np.ndarray, size: int) -> np.ndarray:
    reach = size // 8
    box = _whole(uniform, size)
    box[:, :2] = np.floor(uniform[:, [_TOP, _LEFT]] * (2 * reach + 1)) - reach
    return box


def _resized(uniform: np.ndarray, size: int) -> np.ndarray:
    """The first of ten attempts that fits, as torchvision's RandomResizedCrop; else the whole (square) image."""
    area = size * size * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * uniform[:, :_ATTEMPTS])
    ratio = np.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * uniform[:, _ATTEMPTS : 2 * _ATTEMPTS])
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (width <= size) & (height <= size)
    first = (np.arange(len(uniform)), fits.argmax(1))
    height, width = (np.where(fits[first], side[first], size) for side in (height, width))
    top, left = np.floor(uniform[:, _TOP] * (size - height + 1)), np.floor(uniform[:, _LEFT] * (size - width + 1))
    return np.stack([top, left, height, width], 1).astype(np.int64)


_BOXES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"none": _whole, "shift": _shifted, "resized": _resized}


def _normalise(images, mean, std, out):
    for b in numba.prange(len(images)):
        for y in range(images.shape[1]):
            for k in range(images.shape[2]):
                out[b, y, k] = (np.float32(images[b, y, k]) - mean[k]) / std[k]


def _show(images, boxes, flips, factors, orders, pads, jitters, mean, std, out):
    scale, bias = 1 / std, -mean / std
    for b in numba.prange(len(images)):
        if jitters:
            _resample(images[b], boxes[b], flips[b], pads, np.ones_like(scale), np.zeros_like(bias), out[b])
            _jitter(out[b], factors[b], orders[b])
            for y in range(out.shape[1]):
                _scale_row(out[b, y], scale, bias)
        else:
            _resample(images[b], boxes[b], flips[b], pads, scale, bias, out[b])


@numba.njit(**_COMPILED)
def _resample(image, box, flip, pads, scale, bias, out):
    """Bilinear, and times `scale` plus `bias`; the box is never larger than the image, so that no pixels have to be averaged away."""
    size = len(image)
    top, left, height, width = box
    # What a shift uncovers shows the image's edge; a crop shows nothing beyond itself.
    low_y, high_y = (0, size - 1) if pads else (top, top + height - 1)
    low_x, high_x = (0, size - 1) if pads else (left, left + width - 1)
    # Three more, because the last pixel looks at the next, with no weight.
    row = np.zeros(3 * size + 3, np.float32)
    source, here, there = np.empty(3 * size, np.uint32), np.empty(3 * size, np.float32), np.empty(3 * size, np.float32)
    for x in range(size):
        first, part = _between(x, left, width, size, low_x, high_x)
        place = 3 * (size - 1 - x if flip else x)
        for k in range(place, place + 3):
            source[k], here[k], there[k] = 3 * first + k - place, (1 - part) * scale[k], part * scale[k]
    for y in range(size):
        # Down before across: the pixels of a row lie together.
        first, part = _between(y, top, height, size, low_y, high_y)
        second, seen = min(first + 1, high_y), slice(3 * low_x, 3 * high_x + 3)
        _blend_rows(image[first][seen], image[second][seen], part, row[seen])
        _blend_pixels(row, source, here, there, bias, out[y])


@numba.njit(**_COMPILED)
def _blend_rows(upper, lower, part, row):
    for k in range(len(upper)):
        value = np.float32(upper[k])
        row[k] = value + part * (np.float32(lower[k]) - value)


@numba.njit(**_COMPILED)
def _blend_pixels(row, source, here, there, bias, out):
    for k in range(len(out)):
        out[k] = row[source[k]] * here[k] + row[source[k] + np.uint32(3)] * there[k] + bias[k]


@numba.njit(**_COMPILED)
def _scale_row(row, scale, bias):
    for k in range(len(row)):
        row[k] = row[k] * scale[k] + bias[k]


@numba.njit(**_COMPILED)
def _between(place, start, length, size, low, high):
    """The source pixel at or before an output pixel, and the share of the next one; pixels are squares with centres at halves."""
    source = min(max(start + (place + 0.5) * length / size - 0.5, low), high)
    first = np.int64(source)
    return first, np.float32(source - first)


@numba.njit(**_COMPILED)
def _jitter(pixels, factors, order):
    """Brightness (0), contrast (1) and saturation (2) of (H, 3 H) pixels in 0..255: blends with black, the mean grey, the pixel's grey."""
    for kind in order:
        factor, mean = factors[kind], np.float32(0)
        if kind == 1:
            for y in range(len(pixels)):
                for x in range(0, pixels.shape[1], 3):
                    mean += _grey(pixels[y], x)
            mean /= len(pixels) * (pixels.shape[1] // 3)
        for y in range(len(pixels)):
            for x in range(0, pixels.shape[1], 3):
                other = (1 - factor) * (_grey(pixels[y], x) if kind == 2 else mean)
                for c in range(3):
                    pixels[y, x + c] = min(max(factor * pixels[y, x + c] + other, np.float32(0)), np.float32(255))


@numba.njit(**_COMPILED)
def _grey(row, x):
    return np.float32(_GREY[0]) * row[x] + np.float32(_GREY[1]) * row[x + 1] + np.float32(_GREY[2]) * row[x + 2]
