"""The meta-objective of MetaDiff (AAAI 2024), Eq. 12 and Algorithm 1."""

from typing import Literal

import torch
from torch import Tensor, nn

from metadiff.learners import Support
from metadiff.parallel import ALONE, Ranks
from metadiff.schedule import Schedule

Weighting = Literal["eps", "min_snr", "x0"]
MIN_SNR_GAMMA = 5.0


def draw(generator: torch.Generator, w_0: Tensor, num_steps: int, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """One t ~ Uniform{0 .. T-1} a task (B,), and eps ~ N(0, I) shaped like w_0, on the generator's device. Algorithm 1, lines 4 and 5.

    Every rank draws for the batch of all ranks, of which w_0 is its share: a task has the same t and eps however many there are.
    """
    size = len(w_0) * ranks.world
    t = torch.randint(num_steps, (size,), generator=generator, device=generator.device)
    eps = torch.randn((size, *w_0.shape[1:]), generator=generator, device=generator.device, dtype=w_0.dtype)
    share = ranks.share(size)
    return t[share], eps[share]


def diffusion_loss(
    denoiser: nn.Module, schedule: Schedule, w_0: Tensor, support: Support, t: Tensor, eps: Tensor, weighting: Weighting = "eps"
) -> Tensor:
    """The scalar E ||eps - eps_theta(w_t, S, t)||^2 as a mean over all elements. Eq. 12.

    `denoiser` is a `Denoiser`, perhaps wrapped for several ranks; `w_0` and `eps` are (B, N, D), `t` is (B,);
    `weighting` is that of `loss_weights`.
    """
    eps_hat = denoiser(schedule.q_sample(w_0, t, eps), support, t)
    errors = (eps - eps_hat).square().mean((1, 2))
    return (errors * loss_weights(schedule, weighting).to(errors)[t]).mean()


def loss_weights(schedule: Schedule, weighting: Weighting) -> Tensor:
    """(T,) float64: what multiplies the squared error of eps at each t, with SNR_t = abar_t / (1 - abar_t).

    "eps": 1, the paper's. "min_snr": min(SNR, 5) / SNR ("Efficient Diffusion Training via Min-SNR Weighting Strategy", ICCV 2023).
    "x0": 1 / SNR, so that the error is that of the w_0 which eps_hat implies; of a `consistent` denoiser's a - w_0, unweighted.
    """
    snr = schedule.abar / (1 - schedule.abar)
    if weighting == "eps":
        return torch.ones_like(snr)
    return (snr.clamp(max=MIN_SNR_GAMMA) if weighting == "min_snr" else 1.0) / snr
