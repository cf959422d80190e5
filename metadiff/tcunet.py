"""TCUNet, the task-conditional UNet of MetaDiff (AAAI 2024), Section 4.2 and Figure 3, and the learned scale of Table 3 (iii)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """feature(x) * time(e), a block of Figure 3 before its activation; its time layer is applied beforehand."""

    def __init__(self, width_in: int, width_out: int, time_dim: int) -> None:
        super().__init__()
        self.feature = nn.Linear(width_in, width_out)
        self.time = nn.Linear(time_dim, width_out)

    def forward(self, x: Tensor, tau: Tensor) -> Tensor:
        """(*, width_out) from x (*, width_in) and tau = time(e)."""
        return self.feature(x) * tau.to(x.dtype)


class TCUNet(nn.Module):
    """Two encoder blocks, a bottle block and two decoder blocks of widths D/2, D/4, D/4, D/2, D, for any D. Figure 3.

    With D = 512, a 320-dimensional time embedding and the mix it has the authors' 807,745 parameters.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        *,
        time_dim: int,
        time_from_one: bool,
        activation: Literal["softplus", "relu"],
        skips: bool,
        input_skip: bool,
        output_mix: bool,
    ) -> None:
        """`width_in` and `width` are those of input and output; `input_skip` adds the input to the last block's output."""
        super().__init__()
        half, quarter, e = max(1, round(width / 2)), max(1, round(width / 4)), time_dim
        self.eb1 = Block(width_in, half, e)
        self.eb2 = Block(half, quarter, e)
        self.bb = Block(quarter, quarter, e)
        self.db1 = Block(quarter, half, e)
        self.db2 = Block(half, width, e)
        self.mix = nn.Sequential(nn.Linear(e, e // 2), nn.ReLU(), nn.Linear(e // 2, 1), nn.Sigmoid()) if output_mix else None
        self.activation = F.softplus if activation == "softplus" else F.relu
        self.time_dim, self.first_step, self.skips, self.input_skip = e, int(time_from_one), skips, input_skip

    def clock(self, t: Tensor) -> tuple[Tensor, ...]:
        """What depends on t alone, for any shape of t: the blocks' time layers (*t, 1, width), then s(t) (*t, 1, 1) if there is a mix."""
        e = sinusoid(t + self.first_step, self.time_dim).to(self.eb1.feature.weight.dtype)[..., None, :]
        tau = tuple(block.time(e) for block in (self.eb1, self.eb2, self.bb, self.db1, self.db2))
        return tau if self.mix is None else (*tau, self.mix(e))

    def forward(self, g: Tensor, clock: tuple[Tensor, ...]) -> Tensor:
        """(B, N, width) from g (B, N, width_in) and `clock(t)`."""
        act, skips = self.activation, self.skips
        x1 = act(self.eb1(g.to(self.eb1.feature.weight.dtype), clock[0]))
        x2 = act(self.eb2(x1, clock[1]))
        x3 = act(self.bb(x2, clock[2]))
        x4 = act(self.db1(x3 + x2 if skips else x3, clock[3]))
        u = self.db2(x4 + x1 if skips else x4, clock[4]).to(g.dtype)
        u = u + g if skips and self.input_skip else u
        return u if self.mix is None else torch.lerp(u, g, clock[5].to(g.dtype))  # s g + (1 - s) u


class StepScale(nn.Module):
    """eps_hat = s(t) g with a learned s(t), one number a step, from 1. Table 3 (iii)."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_steps))

    def clock(self, t: Tensor) -> tuple[Tensor, ...]:
        """(s(t),), shaped (*t, 1, 1)."""
        return (self.scale[t][..., None, None],)

    def forward(self, g: Tensor, clock: tuple[Tensor, ...]) -> Tensor:
        """(B, N, D), as g."""
        return clock[0] * g


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """(*t, dim): cos(t f_i), then sin(t f_i), with f_i = 10000^(-i / (dim/2)), i = 0 .. dim/2 - 1."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
