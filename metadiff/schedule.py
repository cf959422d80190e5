"""The diffusion process of MetaDiff (AAAI 2024), Section 3.2: beta_t, alpha_t, abar_t, and q(w_t | w_0) of Eq. 2.

Time is an index t in 0 .. T-1 everywhere in the code; the paper's t is that plus one.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from metadiff.config import config

Beta = Annotated[float, Field(gt=0, lt=1)]


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
        return self.signal[t][..., None, None] * w_0 + self.noise[t][..., None, None] * eps
