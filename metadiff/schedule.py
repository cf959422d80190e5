"""The diffusion process of MetaDiff (AAAI 2024), Section 3.2: beta_t, alpha_t, abar_t, and q(w_t | w_0) of Eq. 2.

Time is an index t in 0 .. T-1 everywhere in the code; the paper's t is that plus one.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from metadiff.config import config
from metadiff.errors import UserError

Beta = Annotated[float, Field(gt=0, lt=1)]
Spacing = Literal["even", "log_snr"]


@config
class ScheduleConfig:
    """Linear beta_t from `beta_start` to `beta_end` in `num_steps` steps."""

    num_steps: Annotated[int, Field(gt=0)] = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02


class Schedule:
    """Tables over t = 0 .. T-1.

    Attributes:
        beta, alpha, abar: (T,) float64, on the CPU: beta_t, alpha_t = 1 - beta_t, abar_t = prod_{s <= t} alpha_s.
        signal, noise: (T,) float32: sqrt(abar_t) and sqrt(1 - abar_t).
    """

    def __init__(self, config: ScheduleConfig | None = None, device: torch.device | str = "cpu") -> None:
        """`device` is where `signal` and `noise` live: that of the weights to diffuse."""
        config = config or ScheduleConfig()
        self.num_steps = config.num_steps
        self.beta = torch.linspace(config.beta_start, config.beta_end, config.num_steps, dtype=torch.float64)
        self.alpha = 1 - self.beta
        self.abar = self.alpha.cumprod(0)
        self.signal = self.abar.sqrt().to(device, torch.float32)
        self.noise = (1 - self.abar).sqrt().to(device, torch.float32)

    def q_sample(self, w_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """(B, N, D): w_t = sqrt(abar_t) w_0 + sqrt(1 - abar_t) eps, for t (B,) or (). Eq. 2."""
        return torch.addcmul(self.noise[t][..., None, None] * eps, self.signal[t][..., None, None], w_0)

    def timesteps(self, steps: int | None = None, spacing: Spacing = "even") -> list[int]:
        """The t of `steps` denoising steps, all different, from T-1 downwards; all T of them where None.

        "even": round(T - i T / steps) - 1 for i = 0, 1, ...: whole strides down from where w_T is noise, the last of which ends in w_0
        ("trailing" in "Common Diffusion Noise Schedules and Sample Steps are Flawed", WACV 2024).
        "log_snr": evenly from T-1 to 0 in log(abar_t / (1 - abar_t)), so most of them near w_0 ("DPM-Solver", Lu et al. 2022, Section 3.2).

        Raises:
            UserError: more steps than the schedule has.
        """
        total, steps = self.num_steps, steps or self.num_steps
        if steps > total:
            raise UserError(f"sampler.steps={steps}: the schedule has only {total} (schedule.num_steps); lower it, or leave it out for all")
        if spacing == "even":
            return [round(total - i * total / steps) - 1 for i in range(steps)]
        log_snr = (self.abar / (1 - self.abar)).log()
        nearest = (log_snr[:, None] - torch.linspace(log_snr[-1], log_snr[0], steps, dtype=log_snr.dtype)).abs().argmin(0)
        # Near t = 0 there are more wanted than there are: those that fall together move up, towards noise.
        kept: list[int] = []
        for i, t in enumerate(reversed(nearest.tolist())):
            kept.append(max(min(t, total - steps + i), kept[-1] + 1 if kept else 0))
        return kept[::-1]
