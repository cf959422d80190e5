"""Embedding networks f_phi: images to feature vectors (MetaDiff, AAAI 2024, Sections 4.2 and 5.2)."""

from typing import Literal

import torch
from torch import nn

from metadiff.backbones.conv4 import Conv4
from metadiff.backbones.resnet12 import ResNet12
from metadiff.errors import UserError

BackboneName = Literal["conv4", "resnet12", "resnet18"]


def build_backbone(name: BackboneName, seed: int) -> nn.Module:
    """A backbone with weights drawn from `seed`: (B, 3, H, W) normalised images to (B, D) features."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        match name:
            case "conv4":
                return Conv4()
            case "resnet12":
                return ResNet12()
            case "resnet18":
                return _resnet18()


def feature_dim(backbone: nn.Module, image_size: int) -> int:
    """D for square images of `image_size` pixels.

    Raises:
        UserError: the images are too small for the backbone.
    """
    training = backbone.training
    try:
        with torch.inference_mode():
            return backbone.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
    except RuntimeError:
        raise UserError(
            f"prepare.image_size={image_size}: too small for {type(backbone).__name__}, which halves it four times; use 16 or more"
        ) from None
    finally:
        backbone.train(training)


def _resnet18() -> nn.Module:
    """torchvision's ResNet18 with the small-image stem (3 x 3, stride 1, no pooling): (B, 512)."""
    from torchvision.models import resnet18  # here, because its import takes seconds, in every process

    network = resnet18(weights=None)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    network.fc = nn.Identity()  # type: ignore[assignment]
    return network
