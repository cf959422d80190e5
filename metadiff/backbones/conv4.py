"""Conv4: four convolution blocks (Vinyals et al. 2016; Snell et al. 2017)."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn


class ConvBlock(nn.Module):
    """3 x 3 convolution, batch norm, ReLU, 2 x 2 max pooling."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, out_channels, H // 2, W // 2)."""
        # ReLU and max pooling commute, and a quarter of the elements is left after pooling.
        return F.relu(F.max_pool2d(self.norm(self.conv(x)), 2))


class Conv4(nn.Sequential):
    """(B, 3, H, W) to (B, 64 * (H // 16) * (W // 16)): D = 1600 at 84 x 84, 256 at 32 x 32."""

    def __init__(self, num_filters: int = 64) -> None:
        widths = [3, *[num_filters] * 4]
        super().__init__(*(ConvBlock(a, b) for a, b in pairwise(widths)), nn.Flatten())
