"""ResNet12 of the few-shot literature (64-128-256-512, as in Chen et al. 2021, "Meta-Baseline")."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class ResidualBlock(nn.Module):
    """Three 3 x 3 convolutions beside a 1 x 1 shortcut, then 2 x 2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * 3]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in range(3))
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, out_channels, H // 2, W // 2)."""
        y = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if index < 2:
                y = F.leaky_relu(y, 0.1)
        # Leaky ReLU is monotone, so it commutes with max pooling and sees a quarter of the elements after it.
        return F.leaky_relu(F.max_pool2d(y + self.shortcut(x), 2), 0.1)


class ResNet12(nn.Sequential):
    """(B, 3, H, W) to (B, 512), averaged over positions."""

    def __init__(self) -> None:
        widths = [3, 64, 128, 256, 512]
        blocks = (ResidualBlock(a, b) for a, b in pairwise(widths))
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
