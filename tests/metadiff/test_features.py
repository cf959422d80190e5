from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from metadiff.artifact import commit, workspace
from metadiff.backbones import build_backbone
from metadiff.checkpoint import load_state, save_state
from metadiff.errors import UserError
from metadiff.features import EmbedConfig, FeatureBank, FeaturesConfig, FeatureTransform, embed_images, write_bank
from metadiff.images import AugmentConfig, ImageSet, batches_in_order

SIZE = 8
CPU = torch.device("cpu")
RAW = FeaturesConfig(centre=False, l2=False, std=None)


@pytest.fixture
def images() -> ImageSet:
    labels = np.repeat(np.arange(3), [4, 2, 5])
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
    return ImageSet(pixels, labels, ("a", "b", "c"))


@pytest.fixture
def raw() -> np.ndarray:
    """(5000, 6) features of unlike scales that are far from the origin; more than one block of the fit."""
    noise = np.random.default_rng(0).standard_normal((5000, 6))
    return (noise * [0.1, 1, 2, 3, 4, 20] + [5, -3, 0, 1, 40, 7]).astype(np.float32)


def bank_of(folder: Path, images: ImageSet, settings: EmbedConfig, split: str = "base", backbone: nn.Module | None = None) -> FeatureBank:
    config = {"dtype": settings.dtype, "views": settings.augmented_views, "split": split}
    partial = workspace(folder / "embed", "embed", config, {})
    write_bank(partial, split, images, backbone or nn.Flatten(), settings, AugmentConfig(), 0, CPU)
    return FeatureBank.open(commit(partial, folder / "embed", "embed", config, {}, 0.0), split)


def deviation(features: torch.Tensor) -> float:
    """The root of the variance per dimension, averaged over dimensions."""
    return float(features.double().var(0, correction=0).mean().sqrt())


@pytest.mark.parametrize("std", [0.1, 1.0, 0.02])
@pytest.mark.parametrize("options", [{}, {"l2": False}, {"centre": False}, {"power": 0.5}, {"power": 0.5, "centre": False, "l2": False}])
def test_base_features_have_the_wanted_deviation(raw: np.ndarray, std: float, options: dict[str, Any]) -> None:
    transform = FeatureTransform.fit(raw, FeaturesConfig(std=std, **options))
    assert deviation(transform(raw)) == pytest.approx(std, rel=1e-4)


def test_the_default_is_centre_then_unit_length_then_a_deviation_of_a_tenth(raw: np.ndarray) -> None:
    transform = FeatureTransform.fit(raw, FeaturesConfig())
    exact = torch.from_numpy(raw).double()
    unit = nn.functional.normalize(exact - exact.mean(0), dim=1)
    torch.testing.assert_close(transform(raw), (unit * 0.1 / deviation(unit)).float(), rtol=1e-4, atol=1e-6)
    assert deviation(transform(raw)) == pytest.approx(0.1, rel=1e-4)
    lengths = transform(raw).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, transform.scale), rtol=1e-5, atol=0)


def test_raw_features_stay_as_they_are(raw: np.ndarray) -> None:
    transform = FeatureTransform.fit(raw, RAW)
    assert torch.equal(transform(raw), torch.from_numpy(raw))
    assert (transform.power, transform.l2, transform.scale) == (1.0, False, 1.0)
    assert (transform.mean == 0).all()


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_power_keeps_signs(raw: np.ndarray, power: float) -> None:
    transform = FeatureTransform.fit(raw, FeaturesConfig(power=power, centre=False, l2=False, std=None))
    expected = np.sign(raw) * np.abs(raw) ** power
    torch.testing.assert_close(transform(raw), torch.from_numpy(expected))
    assert transform(np.zeros((1, 6), np.float32)).tolist() == [[0.0] * 6]


def test_power_comes_before_the_mean(raw: np.ndarray) -> None:
    transform = FeatureTransform.fit(raw, FeaturesConfig(power=0.5, l2=False, std=None))
    torch.testing.assert_close(transform(raw).mean(0), torch.zeros(6), atol=1e-4, rtol=0)


def test_the_transform_is_the_base_classes_for_all(raw: np.ndarray) -> None:
    transform = FeatureTransform.fit(raw, FeaturesConfig())
    other = raw[:50] * 3 + 1
    assert torch.equal(transform(other)[:7], transform(other[:7]))
    assert deviation(FeatureTransform.fit(other, FeaturesConfig())(other)) != pytest.approx(deviation(transform(other)), rel=0.01)


def test_arrays_and_tensors_of_any_type_and_shape_are_taken(raw: np.ndarray) -> None:
    transform = FeatureTransform.fit(raw, FeaturesConfig())
    expected = transform(raw[:6])
    assert expected.dtype == torch.float32
    assert torch.equal(transform(torch.from_numpy(raw[:6])), expected)
    assert torch.equal(transform(raw[:6].reshape(2, 3, 6)), expected.view(2, 3, 6))
    assert torch.equal(transform(raw[:6].astype(np.float64)), expected)
    torch.testing.assert_close(transform(raw[:6].astype(np.float16)), expected, rtol=0.02, atol=1e-3)
    frozen = raw[:6].copy()
    frozen.flags.writeable = False
    assert torch.equal(transform(frozen), expected)
    assert (frozen == raw[:6]).all()


def test_a_zero_vector_stays_one() -> None:
    raw = np.array([[1.0, 0], [-1, 0], [0, 0], [0, 2], [0, -2]], np.float32)
    transform = FeatureTransform.fit(raw, FeaturesConfig())
    assert transform(raw)[2].tolist() == [0, 0]
    assert torch.isfinite(transform(raw)).all()


@pytest.mark.parametrize("settings", [FeaturesConfig(), FeaturesConfig(power=0.5, centre=False, l2=False, std=None), RAW])
def test_state_comes_back_from_a_file(tmp_path: Path, raw: np.ndarray, settings: FeaturesConfig) -> None:
    transform = FeatureTransform.fit(raw, settings)
    save_state(tmp_path / "transform.safetensors", transform.state())
    assert torch.equal(FeatureTransform(**load_state(tmp_path / "transform.safetensors"))(raw), transform(raw))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("settings", [FeaturesConfig(), FeaturesConfig(centre=False), FeaturesConfig(std=None), RAW])
def test_features_that_are_not_finite_are_refused(raw: np.ndarray, value: float, settings: FeaturesConfig) -> None:
    raw[4500, 3] = value
    with pytest.raises(UserError, match="feature bank: holds NaN or infinite features; the backbone diverged"):
        FeatureTransform.fit(raw, settings)


@pytest.mark.parametrize("settings", [FeaturesConfig(), FeaturesConfig(l2=False), FeaturesConfig(centre=False)])
def test_features_that_are_all_the_same_are_refused(settings: FeaturesConfig) -> None:
    with pytest.raises(UserError, match="feature bank: all features are the same; the backbone collapsed"):
        FeatureTransform.fit(np.zeros((20, 4), np.float16), settings)


@pytest.mark.parametrize(("dtype", "numpy_dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_bank_holds_every_image_by_class(tmp_path: Path, images: ImageSet, dtype: Any, numpy_dtype: type) -> None:
    bank = bank_of(tmp_path, images, EmbedConfig(dtype=dtype, batch_size=4))
    assert bank.views.shape == (1, 11, 3 * SIZE * SIZE)
    assert bank.views.dtype == numpy_dtype
    assert isinstance(bank.views, np.memmap)
    assert bank.offsets.tolist() == [0, 4, 6, 11]
    assert bank.classes == ("a", "b", "c")
    expected = torch.cat(list(batches_in_order(images.images, 11))).flatten(1).numpy()
    assert (bank.features == expected.astype(numpy_dtype)).all()
    transform = FeatureTransform.fit(bank.features, FeaturesConfig())
    assert deviation(transform(bank.features)) == pytest.approx(0.1, rel=1e-4)


def test_augmented_views_come_after_the_clean_one(tmp_path: Path, images: ImageSet) -> None:
    clean = bank_of(tmp_path / "clean", images, EmbedConfig())
    views = bank_of(tmp_path / "views", images, EmbedConfig(augmented_views=2, batch_size=4)).views
    assert views.shape == (3, *clean.features.shape)
    assert (views[0] == clean.features).all()
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (views[first] != views[second]).any(axis=1).all()
    again = bank_of(tmp_path / "again", images, EmbedConfig(augmented_views=2, batch_size=4)).views
    assert (views == again).all()


def test_only_base_has_augmented_views(tmp_path: Path, images: ImageSet) -> None:
    assert bank_of(tmp_path, images, EmbedConfig(augmented_views=2), split="novel").views.shape[0] == 1


def test_a_split_that_is_not_there_is_a_user_error(tmp_path: Path, images: ImageSet) -> None:
    partial = workspace(tmp_path / "embed", "embed", {}, {})
    write_bank(partial, "base", images, nn.Flatten(), EmbedConfig(), AugmentConfig(), 0, CPU)
    with pytest.raises(UserError, match=r"split 'val': not in .*/embed; the data set has none"):
        FeatureBank.open(commit(partial, tmp_path / "embed", "embed", {}, {}, 0.0), "val")


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) * self.factor


@pytest.mark.parametrize(("factor", "dtype"), [(float("nan"), "fp32"), (float("inf"), "fp32"), (1e5, "fp16")])
@pytest.mark.parametrize("split", ["base", "novel"])
def test_a_bank_of_features_that_are_not_finite_is_not_made(
    tmp_path: Path, images: ImageSet, factor: float, dtype: Any, split: str
) -> None:
    with pytest.raises(UserError, match=rf"embed {split}: features that are NaN or too large for {dtype}"):
        bank_of(tmp_path, images, EmbedConfig(dtype=dtype), split, Times(factor))


def test_bf16_stays_near_fp32(images: ImageSet) -> None:
    backbone = build_backbone("conv4", 0).eval()
    pixels = images.images.repeat(2, 1).repeat(2, 2)
    full, half = (next(embed_images(pixels, backbone, EmbedConfig(precision=precision), None, 0, CPU)) for precision in ("fp32", "bf16"))
    assert full.dtype == half.dtype == np.float32
    assert (full != half).any()
    assert np.abs(full - half).max() < 0.05 * np.abs(full).max()


def test_embedding_leaves_the_caller_s_state_alone(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's global generator was seeded"))
    torch.default_generator.manual_seed(5)
    state, weight = torch.get_rng_state(), torch.ones(2, 2, requires_grad=True)
    for _ in embed_images(images.images, nn.Flatten(), EmbedConfig(batch_size=4, precision="bf16"), AugmentConfig(), 3, CPU):
        assert torch.equal(torch.get_rng_state(), state)
        product = weight @ weight
        assert product.dtype == torch.float32
        assert product.requires_grad
