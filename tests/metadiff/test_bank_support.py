"""A support set out of a bank is the support set whose features were gathered one by one."""

import pytest
import torch
from torch import Tensor

from metadiff.bank_support import BankSupport
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.learners import LinearLearner, PrototypeLearner, Support
from metadiff.schedule import Schedule

B, WAY, DIM = 4, 3, 8
DERIVED = ("features", "labels", "one_hot", "counts", "size", "means", "unit_features")


def both(shot: int, dtype: torch.dtype = torch.float32) -> tuple[BankSupport, Support]:
    generator = torch.Generator().manual_seed(shot)
    bank = torch.randn(20, DIM, generator=generator, dtype=dtype)
    rows = torch.randint(20, (B, WAY, shot), generator=generator)
    features = torch.stack([torch.stack([bank[row] for row in task.flatten()]) for task in rows])
    return BankSupport(bank, rows), Support.of(features, torch.arange(WAY).repeat_interleave(shot).repeat(B, 1), WAY)


@pytest.mark.parametrize("shot", [1, 2, 5])
@pytest.mark.parametrize("name", DERIVED)
def test_everything_is_that_of_the_gathered_set(name: str, shot: int) -> None:
    ours, theirs = both(shot, torch.float64)
    torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
    assert (ours.way, ours.shot) == (WAY, shot)


def test_single_shots_are_the_features_to_the_bit() -> None:
    ours, theirs = both(1)
    assert torch.equal(ours.means, theirs.features)


@pytest.mark.parametrize("name", DERIVED)
def test_a_part_of_the_tasks_is_theirs(name: str) -> None:
    ours, theirs = both(2, torch.float64)
    part = ours[1:3]
    assert isinstance(part, BankSupport)
    torch.testing.assert_close(getattr(part, name), getattr(theirs[1:3], name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "linear", "gathers"),
    [
        ({"preset": "paper"}, False, False),
        ({"preset": "official"}, False, False),
        ({"preset": "stable"}, False, False),
        ({"preset": "consistent"}, False, False),
        ({"gradient": "ce"}, False, True),
        ({"preset": "consistent"}, True, True),
    ],
)
def test_denoisers_see_the_same_and_gather_only_what_they_need(options: dict, linear: bool, gathers: bool) -> None:
    schedule = Schedule()
    denoiser = build_denoiser(DenoiserConfig(**options), DIM, LinearLearner() if linear else PrototypeLearner(), schedule)
    for parameter in denoiser.parameters():  # the last layer of a new consistent denoiser is zero
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    w_t, t = torch.randn(B, WAY, DIM, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 200, 500, 999])
    ours, theirs = both(5)
    found: Tensor = denoiser(w_t, ours, t)
    torch.testing.assert_close(found, denoiser(w_t, theirs, t), rtol=1e-4, atol=1e-5)
    assert ("features" in vars(ours)) == gathers
    assert ("one_hot" in vars(ours)) == gathers
