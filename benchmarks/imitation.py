"""Features like those of mini-ImageNet's base classes under a Conv4 of 20 epochs: centred, of one length, of standard deviation 1."""

import numpy as np
import torch
from torch import Tensor

_RANKS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 800, 1149)
_WITHIN_CLASSES = (58.8, 46.2, 39.0, 29.6, 17.7, 11.1, 5.57, 3.11, 1.50, 0.552, 2.28e-3, 1e-5)
"""Eigenvalues of the real bank's covariance within classes, of so many as are not zero, by their rank."""
_BETWEEN = 0.04
"""The share of the variance that lies between class means, which decides how much classes overlap: so chosen that a loop of L-BFGS needs
about as many evaluations as on the real bank."""
_UNEVEN = 0.5
"""Standard deviation of the logarithm of a class's own variance in a direction."""


def imitation(classes: int = 64, images: int = 600, dim: int = 512, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Features (classes x images, dim) float32 sorted by class, and where each class begins, (classes + 1,)."""
    rng = torch.Generator().manual_seed(seed)
    ranks = np.arange(dim) * (_RANKS[-1] + 1) / dim
    spectrum = torch.from_numpy(np.exp(np.interp(np.sqrt(ranks), np.sqrt(_RANKS), np.log(_WITHIN_CLASSES)))).float()
    means = torch.randn(classes, 1, dim, generator=rng) * spectrum.sqrt()
    own = spectrum * torch.exp(_UNEVEN * torch.randn(classes, 1, dim, generator=rng))
    within = torch.randn(classes, images, dim, generator=rng) * own.sqrt()
    x = _of_variance(means, _BETWEEN) + _of_variance(within, 1 - _BETWEEN)
    turned = x.flatten(0, 1) @ torch.linalg.qr(torch.randn(dim, dim, generator=rng)).Q
    return (turned - turned.mean(0)) / turned.std(), np.arange(classes + 1) * images


def _of_variance(x: Tensor, variance: float) -> Tensor:
    return x * (variance / x.square().mean()).sqrt()
