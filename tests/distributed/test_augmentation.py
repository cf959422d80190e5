from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from distributed.augmentation import Views, draw_views, transformer
from metadiff.images import AugmentConfig, normalise

SIZE, COUNT = 24, 12
NUMBERS = np.arange(COUNT) * 7 + 3
PLAIN = AugmentConfig(crop="none", flip=False)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Smooth in places, rough in others, with black and white in it."""
    generator = np.random.default_rng(0)
    rough = generator.integers(0, 256, (COUNT, SIZE, SIZE, 3))
    rough[:, : SIZE // 2] = np.linspace(0, 255, SIZE)[:, None]
    return rough.astype(np.uint8)


def levels(normal: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, H) pixels in 0 .. 255, undoing `normalise` without rounding."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (normal * std + mean) * 255


def by_torchvision(images: np.ndarray, augment: AugmentConfig, views: Views) -> torch.Tensor:
    """The same views as torchvision shows them, in float."""
    shown, reach = [], SIZE // 8
    for image, (top, left, height, width), flip, factors, order in zip(
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255, *views, strict=True
    ):
        if augment.crop == "shift":
            image = functional.crop(functional.pad(image, [reach], padding_mode="edge"), top + reach, left + reach, SIZE, SIZE)
        else:
            image = functional.resized_crop(image, top, left, height, width, [SIZE, SIZE], antialias=True)
        image = functional.horizontal_flip(image) if flip else image
        for kind in order:
            adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[kind]
            image = adjust(image, float(factors[kind]))
        shown.append(image * 255)
    return torch.stack(shown)


@pytest.mark.parametrize(("crop", "jitter"), [("none", 0.0), ("shift", 0.0), ("resized", 0.0), ("resized", 0.4)])
def test_pixels_are_torchvision_s_for_the_same_view(images: np.ndarray, crop: Any, jitter: float) -> None:
    augment = AugmentConfig(crop=crop, color_jitter=jitter)
    shown = transformer(augment, SIZE, 5, parallel=False)(images, NUMBERS)
    assert shown.is_contiguous(memory_format=torch.channels_last)
    expected = by_torchvision(images, augment, draw_views(augment, SIZE, 5, NUMBERS))
    torch.testing.assert_close(levels(shown), expected, atol=2e-3, rtol=0)


def test_without_augmentation_the_values_are_those_of_the_loader_in_memory(images: np.ndarray) -> None:
    expected = normalise(torch.from_numpy(images).permute(0, 3, 1, 2))
    for augment in (None, PLAIN):
        shown = transformer(augment, SIZE, 0, parallel=False)(images, NUMBERS)
        assert torch.equal(shown, expected)
        assert shown.stride() == expected.stride()


def test_threads_and_batches_change_nothing(images: np.ndarray) -> None:
    augment = AugmentConfig(color_jitter=0.4)
    whole = transformer(augment, SIZE, 5, parallel=False)(images, NUMBERS)
    threaded = transformer(augment, SIZE, 5, parallel=True)
    assert torch.equal(threaded(images, NUMBERS), whole)
    assert torch.equal(threaded(images[3:5], NUMBERS[3:5]), whole[3:5])
    assert not torch.equal(threaded(images, NUMBERS + 1), whole)


def drawn(augment: AugmentConfig, size: int = 84, seed: int = 0, count: int = 20_000) -> Views:
    return draw_views(augment, size, seed, np.arange(count))


def likely_the_same(these: np.ndarray, those: np.ndarray) -> bool:
    """Two samples of one distribution pass, but for one pair in a thousand."""
    test: Any = ks_2samp(these, those)
    return test.pvalue > 1e-3


def test_crops_are_distributed_as_torchvision_s() -> None:
    crop = v2.RandomResizedCrop(84, scale=(0.35, 1.0), antialias=True)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        params = [crop.make_params([torch.zeros(3, 84, 84)]) for _ in range(4000)]
    theirs = np.array([[param[name] for name in ("top", "left", "height", "width")] for param in params])
    ours = drawn(AugmentConfig())[0]
    for column in range(4):
        assert likely_the_same(ours[:, column], theirs[:, column])
    for measure in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3], lambda box: box[:, 0] - box[:, 1]):
        assert likely_the_same(measure(ours), measure(theirs))
    assert (ours[:, :2] >= 0).all()
    for place, side in (ours[:, [0, 2]].T, ours[:, [1, 3]].T):
        assert (place + side <= 84).all()
        assert ((place + side == 84) & (side < 84)).any()


def test_shifts_reach_an_eighth_evenly() -> None:
    boxes = drawn(AugmentConfig(crop="shift"))[0]
    for column in range(2):
        places, counts = np.unique(boxes[:, column], return_counts=True)
        assert places.tolist() == list(range(-10, 11))
        assert np.abs(counts - 20_000 / 21).max() < 5 * np.sqrt(20_000 / 21)
    assert (boxes[:, 2:] == 84).all()
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.03


def test_flips_factors_and_orders_are_even() -> None:
    _, flips, factors, orders = drawn(AugmentConfig(color_jitter=0.4))
    assert abs(flips.mean() - 0.5) < 0.02
    assert 0.6 <= factors.min() < 0.601 < 1.399 < factors.max() <= 1.4
    assert np.abs(factors.mean(0) - 1).max() < 0.01
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 20_000 / 6).max() < 300
    assert not drawn(PLAIN)[1].any()
    assert (drawn(PLAIN)[2] == 1).all()


def test_views_depend_on_seed_and_number_alone() -> None:
    augment = AugmentConfig(color_jitter=0.4)
    whole, part = drawn(augment), draw_views(augment, 84, 0, np.array([9, 4]))
    for all_of, some in zip(whole, part, strict=True):
        np.testing.assert_array_equal(all_of[[9, 4]], some)
    assert (drawn(augment, seed=1)[0] != whole[0]).any(1).mean() > 0.99
