"""TCUNet, the task-conditional UNet of MetaDiff (AAAI 2024), Section 4.2 and Figure 3, and the learned scale of Table 3 (iii)."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """feature(x) * time(e), a block of Figure 3 before its activation; its time layer is applied beforehand."""

    def __init__(self, width_in: int, width_out: int, time_dim: int) -> None:
        super().__init__()
        self.feature = nn.Linear(width_in, width_out)
        self.time = nn.Linear(time_dim, width_out)

    def forward(self, x: Tensor, tau: Tensor, shift: Tensor, products: torch.dtype | None = None) -> Tensor:
        """(*, width_out) from x (*, width_in), tau = time(e) and shift = tau * bias, multiplied in `products` or the weights' own type.

        tau (W x + bias) is computed as tau W x + shift: what depends on the time alone is small, or the same for all tasks.
        """
        weight = self.feature.weight
        h = F.linear(x, weight) if products is None else F.linear(x.to(products), weight.to(products))
        # Of what is learned from, h is needed again for the gradient of tau.
        return torch.addcmul(shift.to(h.dtype), h, tau.to(h.dtype), out=None if h.requires_grad else h)


class TCUNet(nn.Module):
    """Two encoder blocks, a bottle block and two decoder blocks of widths D/2, D/4, D/4, D/2, D, for any D. Figure 3.

    With D = 512, a 320-dimensional time embedding and the mix it has the authors' 807,745 parameters.

    Attributes:
        products: the type that the blocks' matrix products round their factors to, as bfloat16; None: that of the weights.
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
        self.activation = softplus if activation == "softplus" else F.relu
        self.time_dim, self.first_step, self.skips, self.skips_input = e, int(time_from_one), skips, skips and input_skip
        self.products: torch.dtype | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All five."""
        return self.eb1, self.eb2, self.bb, self.db1, self.db2

    def clock(self, t: Tensor) -> tuple[Tensor, ...]:
        """What depends on t alone, for any shape of t: tau and shift of each block (*t, 1, width), and s(t) (*t, 1, 1) where needed.

        The last block's are multiplied by 1 - s(t) if there is a mix. If besides the input is skipped to the output,
        s g + (1 - s) (tau h + g) is g + (1 - s) tau h, and nobody needs s.
        """
        e = sinusoid(t + self.first_step, self.time_dim).to(self.eb1.feature.weight.dtype)
        tau = [linear(block.time, e, self.products)[..., None, :] for block in self.blocks]
        s = None if self.mix is None else self.mix(e)[..., None, :]
        if s is not None:
            tau[-1] = tau[-1] * (1 - s)
        shift = [factor * block.feature.bias for factor, block in zip(tau, self.blocks, strict=True)]
        return (*tau, *shift) if s is None or self.skips_input else (*tau, *shift, s)

    def forward(self, g: Tensor, clock: tuple[Tensor, ...]) -> Tensor:
        """(B, N, width) from g (B, N, width_in) and `clock(t)`."""
        act, skips, products = self.activation, self.skips, self.products
        x1 = act(self.eb1(g.to(self.eb1.feature.weight.dtype), clock[0], clock[5], products))
        x2 = act(self.eb2(x1, clock[1], clock[6], products))
        x3 = act(self.bb(x2, clock[2], clock[7], products))
        x4 = act(self.db1(_plus(x3, x2) if skips else x3, clock[3], clock[8], products))
        u = self.db2(_plus(x4, x1) if skips else x4, clock[4], clock[9], products).to(g.dtype)
        if self.skips_input:
            return u.add_(g)
        return u if self.mix is None else torch.addcmul(u, g, clock[10].to(g.dtype))


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


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, over x where nobody learns from it."""
    return x + y if x.requires_grad else x.add_(y)


def linear(layer: nn.Linear, x: Tensor, products: torch.dtype | None) -> Tensor:
    """`layer(x)`, its factors rounded to `products` where given; the result is of that type, too."""
    weight, bias = layer.weight, layer.bias
    return F.linear(x, weight, bias) if products is None else F.linear(x.to(products), weight.to(products), bias.to(products))


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), up to an absolute error of a unit in the last place of 1.

    On a CPU by exp and log: torch's own takes log1p, which is several times slower there.
    """
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return F.softplus(z)
    return _Softplus.apply(z) if z.requires_grad else _softplus(z)  # type: ignore[return-value]


class _Softplus(torch.autograd.Function):
    """`softplus` on a CPU, with torch's own gradient, which is one pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return _softplus(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (z,), (d,) = ctx.saved_tensors, gradients
        return torch.ops.aten.softplus_backward(d, z, 1, 20)


def _softplus(z: Tensor) -> Tensor:
    # Long before 80, softplus(z) is z, and soon after, e^z overflows. Long before -50, 1 + e^z is 1, and soon after, e^z is a denormal
    # number, which takes a hundred times as long. Few bits cannot hold 1 + e^z.
    y = (z if z.itemsize > 2 else z.float()).clamp(-50, 80).exp_().add_(1).log_().to(z.dtype)
    return torch.maximum(z, y, out=y)
