"""TCUNet and its gradient written out: in small batches, what autograd spends on a hundred small steps is as much as the steps themselves.

With z = tau (h + b), h = W x and tau = V e + c in each of the five blocks, its share of the chain rule is dh = dz tau,
dtau = sum dz (h + b) over the N classes, db = sum dz tau over all rows, and for every linear layer y = W x, dW = dy^T x.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metadiff.tcunet import TCUNet, sinusoid, softplus


def learn(body: TCUNet, x: Tensor, t: Tensor) -> Tensor:
    """`body(x, body.clock(t))` for x (B, N, width_in), which nobody learns from, and t (B,); (B, N, width)."""
    assert not x.requires_grad
    return _Learned.apply(body, x, t, *_parameters(body))  # type: ignore[return-value]


def _parameters(body: TCUNet) -> list[Tensor]:
    """As `body.parameters()`, which looks for them through all modules."""
    layers = [layer for block in body.blocks for layer in (block.feature, block.time)]
    layers += [] if body.mix is None else [_layer(body, 0), _layer(body, 2)]
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: TCUNet, x: Tensor, t: Tensor, *_: Tensor) -> Tensor:
        ctx.tape = tape = _Tape(body, x, t)
        return tape.out()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tape, ctx.tape = ctx.tape, None
        return None, None, None, *tape.gradients(gradients[0])


class _Tape:
    """What the way forward leaves for the way back."""

    def __init__(self, body: TCUNet, x: Tensor, t: Tensor) -> None:
        dtype = body.eb1.feature.weight.dtype
        self.body, self.x, self.soft = body, x.to(dtype), body.activation is softplus
        self.e = sinusoid(t + body.first_step, body.time_dim).to(dtype)
        self.tau = [_linear(block.time, self.e)[:, None] for block in body.blocks]
        self.inputs: list[Tensor] = []
        self.h: list[Tensor] = []
        self.z: list[Tensor] = []
        if body.mix is not None:
            self.inner = _linear(_layer(body, 0), self.e).relu_()
            self.s = _linear(_layer(body, 2), self.inner).sigmoid_()[..., None]

    def out(self) -> Tensor:
        """The blocks, their skips and the mix; see `TCUNet.clock` for what becomes of s."""
        body, x, shape = self.body, self.x.flatten(0, 1), self.x.shape[:2]
        for place, block in enumerate(body.blocks):
            self.inputs.append(x)
            self.h.append((x @ block.feature.weight.t()).view(*shape, -1))
            if place == 4:
                break
            tau = self.tau[place]
            self.z.append(torch.addcmul(tau * block.feature.bias, self.h[place], tau))
            x = (softplus(self.z[place]) if self.soft else self.z[place].relu()).flatten(0, 1)
            if body.skips and place >= 2:
                x += self.inputs[4 - place]
        self.last = self.tau[4] if body.mix is None else self.tau[4] * (1 - self.s)
        u = torch.addcmul(self.last * body.db2.feature.bias, self.h[4], self.last)
        if body.skips_input:
            return u.add_(self.x)
        return u if body.mix is None else u.addcmul_(self.x, self.s)

    def gradients(self, d: Tensor) -> list[Tensor]:
        """Those of all parameters, in their order, from that of the output."""
        body, found, skipped = self.body, [], {}
        of_s = None if body.mix is None or body.skips_input else (d * self.x).sum((1, 2))[:, None]
        for place in (4, 3, 2, 1, 0):
            block = body.blocks[place]
            if place < 4:
                d = d.view_as(self.z[place])
                d = torch.ops.aten.softplus_backward(d, self.z[place], 1, 20) if self.soft else d * (self.z[place] > 0)
            tau, of_shift = self.last if place == 4 else self.tau[place], d.sum(1)
            of_tau = torch.addcmul((d * self.h[place]).sum(1), of_shift, block.feature.bias)
            if place == 4 and body.mix is not None:
                through = (of_tau * self.tau[4][:, 0]).sum(1, keepdim=True)
                of_s = -through if of_s is None else of_s - through
                of_tau = of_tau * (1 - self.s[:, 0])
            of_h = (d * tau).flatten(0, 1)
            of_bias = (of_shift * tau[:, 0]).sum(0)
            found = [of_h.t() @ self.inputs[place], of_bias, *_gradients(self.e, of_tau), *found]
            if place:
                d = of_h @ block.feature.weight
            if body.skips and place in (1, 2):
                d += skipped[place]
            if body.skips and place >= 3:
                skipped[5 - place] = d
        return found if of_s is None else [*found, *self._of_mix(of_s)]

    def _of_mix(self, of_s: Tensor) -> list[Tensor]:
        s = self.s[:, 0]
        of_last = of_s * s * (1 - s)
        of_inner = (of_last @ _layer(self.body, 2).weight) * (self.inner > 0)
        return [*_gradients(self.e, of_inner), *_gradients(self.inner, of_last)]


def _layer(body: TCUNet, place: int) -> nn.Linear:
    assert body.mix is not None
    layer = body.mix[place]
    assert isinstance(layer, nn.Linear)
    return layer


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return torch.addmm(layer.bias, x, layer.weight.t())


def _gradients(x: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
    """Of a linear layer's weight and bias."""
    return of_y.t() @ x, of_y.sum(0)
