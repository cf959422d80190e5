"""Sampling weights by denoising: Eqs. 5-8 and Algorithm 2 of MetaDiff (AAAI 2024)."""

from collections import deque
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from metadiff.config import config
from metadiff.denoiser import Denoiser
from metadiff.learners import Support
from metadiff.schedule import Schedule


@config
class SamplerConfig:
    """How w_T becomes w_0.

    Attributes:
        stochastic: keep sigma_t z, the uncertainty term that the paper drops at test time.
        eq8_as_printed: divide by sqrt(1 - alpha_t), as the paper's Eq. 8 does by mistake, instead of Eq. 3's sqrt(1 - abar_t).
        precision: of the denoiser's matrix products; w_t itself stays in float32.
        chunk: tasks denoised together; few enough for their activations to stay in the cache.
    """

    stochastic: bool = False
    eq8_as_printed: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    chunk: Annotated[int, Field(gt=0)] = 128


class StepCoefficients(NamedTuple):
    """gamma, eta and xi of Eq. 6."""

    gamma: float
    eta: float
    xi: float


def coefficients(schedule: Schedule, t: int, config: SamplerConfig) -> StepCoefficients:
    """gamma_t = 1/sqrt(alpha_t), eta_t = beta_t / (sqrt(alpha_t) sqrt(1 - abar_t)), and xi_t = sigma_t = sqrt(beta_t) or 0. Eq. 5."""
    alpha, beta, abar = (float(table[t]) for table in (schedule.alpha, schedule.beta, schedule.abar))
    denominator = (1 - (alpha if config.eq8_as_printed else abar)) ** 0.5
    return StepCoefficients(alpha**-0.5, beta / (alpha**0.5 * denominator), beta**0.5 if config.stochastic else 0.0)


def step(w_t: Tensor, eps_hat: Tensor, c: StepCoefficients, z: Tensor | None = None) -> Tensor:
    """w_{t-1} = gamma w_t - eta eps_hat + xi z. Eq. 6; with gamma = 1 and xi = 0 it is the gradient descent of Eq. 4."""
    w = torch.add(w_t, eps_hat, alpha=-c.eta / c.gamma).mul_(c.gamma)
    return w if z is None else w.add_(z, alpha=c.xi)


@torch.inference_mode()
def denoise_steps(
    denoiser: Denoiser,
    schedule: Schedule,
    support: Support,
    w_T: Tensor,
    config: SamplerConfig | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (t, w_t) for t = T, T-1 .. 0 in the paper's count: first w_T itself, last w_0. Algorithm 2; Figure 5.

    `support` holds B tasks and `w_T` is (B, N, D). All tasks go through each step together, whatever `config.chunk` says.
    `generator` draws z and is needed when `config.stochastic`.
    """
    config = config or SamplerConfig()
    assert (generator is not None) == config.stochastic, "a generator goes with stochastic sampling, and only with it"
    # What depends on the step alone, or on the tasks alone, is computed once.
    condition, clock = denoiser.condition(support), denoiser.clock(torch.arange(schedule.num_steps, device=w_T.device))
    if config.precision == "bf16":
        denoiser = denoiser.rounded(torch.bfloat16)
    w = w_T
    yield schedule.num_steps, w
    for t in reversed(range(schedule.num_steps)):
        eps_hat = denoiser.predict(w, condition, clock[t])
        z = torch.randn(w.shape, generator=generator, device=w.device) if config.stochastic else None
        w = step(w, eps_hat, coefficients(schedule, t, config), z)
        yield t, w


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    support: Support,
    w_T: Tensor,
    config: SamplerConfig | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, N, D): w_0, the last of `denoise_steps`, `config.chunk` tasks at a time."""
    config = config or SamplerConfig()
    # Noise is drawn for all tasks at once: else w_0 would depend on the size of a chunk.
    chunk = len(w_T) if config.stochastic else config.chunk
    w_0 = torch.empty_like(w_T)
    for start in range(0, len(w_T), chunk):
        tasks = slice(start, start + chunk)
        steps = denoise_steps(denoiser, schedule, support[tasks], w_T[tasks], config, generator)
        _, w_0[tasks] = deque(steps, maxlen=1)[0]
    return w_0
