from pathlib import Path

import pytest

from metadiff.config import config, load, validate
from metadiff.denoiser import DenoiserConfig
from metadiff.errors import UserError
from metadiff.features import FeaturesConfig
from metadiff.optimisation import TrainConfig
from metadiff.presets import PRESETS, underlay
from metadiff.targets import TargetsConfig


@config
class Whole:
    """The sections that presets speak of."""

    denoiser: DenoiserConfig = DenoiserConfig()
    features: FeaturesConfig = FeaturesConfig()
    targets: TargetsConfig = TargetsConfig()
    train: TrainConfig = TrainConfig()


def _load(tmp_path: Path, *overrides: str, text: str = "") -> Whole:
    path = tmp_path / "c.yaml"
    path.write_text(text, "utf-8")
    return load(Whole, path, overrides, underlay)


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_of_a_preset_is_valid_and_arrives(tmp_path: Path, name: str) -> None:
    whole = _load(tmp_path, f"denoiser.preset={name}")
    for section, options in PRESETS[name].items():
        assert {key: getattr(getattr(whole, section), key) for key in options} == options


def test_presets_differ_as_documented(tmp_path: Path) -> None:
    paper, official, stable, consistent = (
        _load(tmp_path, f"denoiser.preset={name}") for name in ("paper", "official", "stable", "consistent")
    )
    assert (paper.denoiser.gain, paper.denoiser.time_dim, paper.denoiser.time_from_one, paper.denoiser.output_mix) == (
        "mean",
        32,
        True,
        False,
    )
    assert (official.denoiser.gain, official.denoiser.time_dim, official.denoiser.time_from_one, official.denoiser.output_mix) == (
        "sum",
        320,
        False,
        True,
    )
    assert (stable.denoiser.gain, stable.denoiser.output_mix, stable.denoiser.form) == ("one", True, "direct")
    assert (consistent.denoiser.form, consistent.denoiser.output_mix) == ("consistent", False)
    assert (paper.train.ema_decay, official.train.ema_decay, official.train.ema_start) == (None, 0.9999, 2000)
    assert paper.train.iterations * paper.train.batch_size == 2_400_000
    assert (official.features.std, official.features.centre, official.features.l2) == (None, False, False)
    assert (stable.features.std, stable.features.centre, stable.features.l2) == (0.1, True, True)


def test_stable_is_the_default(tmp_path: Path) -> None:
    assert _load(tmp_path) == _load(tmp_path, "denoiser.preset=stable")
    assert _load(tmp_path).denoiser.preset == "stable"


def test_what_the_user_writes_lies_above(tmp_path: Path) -> None:
    text = "denoiser: {preset: official, gain: 3}\ntrain: {batch_size: 16}\n"
    whole = _load(tmp_path, "features.std=0.5", text=text)
    assert (whole.denoiser.gain, whole.denoiser.time_dim) == (3, 320)
    assert (whole.train.batch_size, whole.train.iterations) == (16, 300_000)
    assert (whole.features.std, whole.features.centre) == (0.5, False)


@pytest.mark.parametrize("name", PRESETS)
def test_denoiser_section_alone_knows_its_preset(name: str) -> None:
    """In Python as in YAML: a preset that is only a label would train something else than it says."""
    assert DenoiserConfig(preset=name) == validate(DenoiserConfig, PRESETS[name]["denoiser"], "test")  # type: ignore[arg-type]
    assert DenoiserConfig(preset=name, time_dim=64).time_dim == 64  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["denoiser: {preset: oficial}", "denoiser: {preset: [paper]}", "denoiser: 3"])
def test_no_such_preset_is_a_user_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="denoiser"):
        _load(tmp_path, text=text)


def test_underlay_is_the_callers_own() -> None:
    underlay({})["train"]["batch_size"] = 1
    assert underlay({})["train"]["batch_size"] == 128
