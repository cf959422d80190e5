"""The steps of each solver that turns w_T into w_0, as coefficients: Eq. 8 of MetaDiff (AAAI 2024), DDIM, and multistep solvers.

Each step is linear in what it sees, so that all share one update, Eq. 6 with one term more:  w' = gamma w - eta eps_hat + xi z + mu x_0',
where w' is the next w, and x_0' the w_0 that the step before foresaw. Throughout, a prime marks the next t that is kept; after the last
one comes w_0 itself, with abar' = 1. sigma = sqrt(1 - abar), and lambda = log(sqrt(abar) / sigma) is half the logarithm of the SNR.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metadiff.schedule import Schedule


class Step(NamedTuple):
    """From w_t to the next w: gamma, eta and xi of Eq. 6, and mu.

    `signal` and `noise` are sqrt(abar_t) and sqrt(1 - abar_t), for the w_0 that is foreseen at t.
    """

    t: int
    gamma: float
    eta: float
    xi: float = 0.0
    mu: float = 0.0
    signal: float = 1.0
    noise: float = 0.0


def update(w: Tensor, eps_hat: Tensor, c: Step, z: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """gamma w - eta eps_hat + xi z + mu x_0', written over `eps_hat`. With gamma = 1 and no more, the gradient descent of Eq. 4."""
    w = eps_hat.mul_(-c.eta).add_(w, alpha=c.gamma)
    if z is not None:
        w.add_(z, alpha=c.xi)
    return w if before is None else w.add_(before, alpha=c.mu)


def foresee(w_t: Tensor, eps_hat: Tensor, c: Step) -> Tensor:
    """The w_0 that w_t and its predicted noise imply: (w_t - sqrt(1 - abar_t) eps_hat) / sqrt(abar_t), Eq. 2 solved for w_0."""
    return torch.add(w_t, eps_hat, alpha=-c.noise).mul_(1 / c.signal)


def equation_8(schedule: Schedule, timesteps: Sequence[int], stochastic: bool = False, as_printed: bool = False) -> list[Step]:
    """gamma_t = 1/sqrt(alpha_t), eta_t = beta_t / (sqrt(alpha_t) sqrt(1 - abar_t)) and xi_t = sigma_t = sqrt(beta_t), or 0. Eq. 5.

    Where steps are left out, alpha_t is abar / abar' and beta_t = 1 - alpha_t ("Improved DDPM", Nichol and Dhariwal 2021, Eq. 19).
    The last step adds no noise, as in "DDPM" (Ho et al. 2020, Algorithm 2). `as_printed` divides by sqrt(1 - alpha_t), Eq. 8's misprint.
    """
    steps = []
    for t, abar, after in _pairs(schedule, timesteps):
        alpha, beta = abar / after, 1 - abar / after
        eta = beta / math.sqrt(alpha * (beta if as_printed else 1 - abar))
        steps.append(Step(t, alpha**-0.5, eta, math.sqrt(beta) if stochastic and after < 1 else 0.0))
    return steps


def ddim(schedule: Schedule, timesteps: Sequence[int], stochastic: bool = False) -> list[Step]:
    """w' = sqrt(abar') x_0 + sqrt(1 - abar' - s^2) eps_hat + s z, with x_0 as foreseen ("DDIM", Song et al. 2021, Eq. 12).

    s is 0 (their eta = 0), or where `stochastic` sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar') (their eta = 1).
    """
    steps = []
    for t, abar, after in _pairs(schedule, timesteps):
        variance = (1 - after) / (1 - abar) * (1 - abar / after) if stochastic else 0.0
        gamma = math.sqrt(after / abar)
        steps.append(Step(t, gamma, gamma * math.sqrt(1 - abar) - math.sqrt(1 - after - variance), math.sqrt(variance)))
    return steps


def dpmpp_2m(schedule: Schedule, timesteps: Sequence[int], sde: bool = False, stochastic: bool = False) -> list[Step]:
    """w' = (sigma'/sigma) e^(-(k-1)h) w + sqrt(abar') (1 - e^(-kh)) D, with h = lambda' - lambda and D = x_0 + (x_0 - x_0') h / 2h'.

    Here h' is the step before. k = 1: "DPM-Solver++" 2M (Lu et al. 2022, Algorithm 2), of second order in the probability-flow ODE, which
    keeps the spread of w_t. k = 2 (`sde`): SDE-DPM-Solver++ 2M (its appendix), without noise unless `stochastic`: its first order *is*
    Eq. 8, so that it follows the paper's noiseless path, to second order.

    The first step knows no x_0', and the last ends where lambda is infinite: both are of first order, D = x_0.
    """
    k, before, steps = 2 if sde else 1, math.inf, []
    for t, abar, after in _pairs(schedule, timesteps):
        signal, noise, noise_after = math.sqrt(abar), math.sqrt(1 - abar), math.sqrt(1 - after)
        h = _half_log_snr(after) - _half_log_snr(abar)
        pull = -math.sqrt(after) * math.expm1(-k * h)
        lean = pull * h / (2 * before) if math.isfinite(h) else 0.0
        keep, to_x_0 = noise_after / noise * (math.exp(-h) if sde else 1.0), (pull + lean) / signal
        xi = noise_after * math.sqrt(-math.expm1(-2 * h)) if stochastic else 0.0
        steps.append(Step(t, keep + to_x_0, to_x_0 * noise, xi, -lean, signal, noise))
        before = h
    return steps


def _half_log_snr(abar: float) -> float:
    return 0.5 * math.log(abar / (1 - abar)) if abar < 1 else math.inf


def _pairs(schedule: Schedule, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, abar, abar') for each."""
    abar: list[float] = schedule.abar[list(timesteps)].tolist()
    return list(zip(timesteps, abar, [*abar[1:], 1.0], strict=True))
