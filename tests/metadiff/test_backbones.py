from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metadiff.backbones import BackboneName, build_backbone, feature_dim
from metadiff.backbones.conv4 import ConvBlock
from metadiff.backbones.resnet12 import ResidualBlock
from metadiff.errors import UserError

NAMES: tuple[BackboneName, ...] = get_args(BackboneName)


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "image_size", "dim"),
    [
        ("conv4", 84, 1600),
        ("conv4", 32, 256),
        ("conv4", 28, 64),
        ("conv4", 16, 64),
        ("resnet12", 32, 512),
        ("resnet12", 17, 512),
        ("resnet18", 16, 512),
    ],
)
def test_feature_dim(name: BackboneName, image_size: int, dim: int) -> None:
    backbone = build_backbone(name, 0)
    assert feature_dim(backbone, image_size) == dim
    assert backbone(torch.zeros(2, 3, image_size, image_size)).shape == (2, dim)


@pytest.mark.parametrize(("name", "count"), [("conv4", 112_832), ("resnet12", 7_996_800), ("resnet18", 11_168_832)])
def test_number_of_parameters(name: BackboneName, count: int) -> None:
    """By hand: conv4 is 9 (3 + 3 x 64) 64 weights and 4 norms of 128; a block of resnet12 is 10 a b + 18 b^2 weights and 4 norms of 2 b;
    resnet18 is torchvision's 11,689,512 without its 513,000 of the classifier and with a stem of 9 x 3 x 64 for 49 x 3 x 64.
    """
    assert num_parameters(build_backbone(name, 0)) == count


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_seed_alone(name: BackboneName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's global generator was seeded"))
    torch.default_generator.manual_seed(1)
    state = torch.get_rng_state()
    first = build_backbone(name, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.default_generator.manual_seed(2)
    same, other = build_backbone(name, 7).state_dict(), build_backbone(name, 8).state_dict()
    assert all(torch.equal(first[key], same[key]) for key in first)
    weights = [key for key in first if first[key].dim() == 4]
    assert weights
    assert not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", ["conv4", "resnet12"])
def test_too_small_an_image_is_a_user_error(name: BackboneName) -> None:
    backbone = build_backbone(name, 0)
    with pytest.raises(UserError, match=r"prepare.image_size=15: too small for \w+, which halves it four times; use 16 or more"):
        feature_dim(backbone, 15)
    assert backbone.training


def test_asking_for_the_dimension_changes_nothing() -> None:
    backbone = build_backbone("conv4", 0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    feature_dim(backbone, 16)
    assert backbone.training
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    feature_dim(backbone.eval(), 16)
    assert not backbone.training


def randomised(block: nn.Module) -> nn.Module:
    """With norms that also turn signs around, or activation and pooling would commute for want of negative numbers."""
    generator = torch.Generator().manual_seed(0)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return block


@pytest.mark.parametrize("training", [True, False])
def test_conv4_block_equals_the_textbook_order(training: bool) -> None:
    block = randomised(ConvBlock(3, 8)).train(training)
    assert isinstance(block, ConvBlock)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    textbook = F.max_pool2d(F.relu(block.norm(block.conv(x))), 2)
    assert torch.equal(block(x), textbook)
    assert 0 < (textbook == 0).float().mean() < 1


@pytest.mark.parametrize("training", [True, False])
def test_resnet12_block_equals_the_textbook_order(training: bool) -> None:
    block = randomised(ResidualBlock(3, 8)).train(training)
    assert isinstance(block, ResidualBlock)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    y = F.leaky_relu(block.norms[0](block.convs[0](x)), 0.1)
    y = F.leaky_relu(block.norms[1](block.convs[1](y)), 0.1)
    y = block.norms[2](block.convs[2](y)) + block.shortcut(x)
    textbook = F.max_pool2d(F.leaky_relu(y, 0.1), 2)
    assert torch.equal(block(x), textbook)
    assert 0 < (textbook < 0).float().mean() < 1


def test_gradients_equal_those_of_the_textbook_order() -> None:
    block = randomised(ConvBlock(3, 8))
    assert isinstance(block, ConvBlock)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    fast = torch.autograd.grad(block(x).square().sum(), block.conv.weight)[0]
    slow = torch.autograd.grad(F.max_pool2d(F.relu(block.norm(block.conv(x))), 2).square().sum(), block.conv.weight)[0]
    assert torch.equal(fast, slow)
