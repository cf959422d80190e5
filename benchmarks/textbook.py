"""MetaDiff (AAAI 2024) written down from the paper without a thought of speed: what `benchmarks.diffusion` measures against.

Autograd takes the gradient of Eq. 11, on the difference of every support feature to every class's weights; the time embedding is computed
in every call; testing goes task by task through all steps. The architecture is the preset `official`. Nothing here is made slow on
purpose: batches are tensors, Adam is torch's default, and at 512 tasks a tenth of the machine's matrix rate is reached.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_DIM = 320


class TimeBlock(nn.Module):
    """A fully connected layer whose output is multiplied by one of the time embedding. Figure 3."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.feature, self.time = nn.Linear(width_in, width_out), nn.Linear(TIME_DIM, width_out)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.feature(x) * self.time(e)


class TextbookDenoiser(nn.Module):
    """eps_theta(w_t, S, t) of Section 4.2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eb1, self.eb2, self.bb = TimeBlock(dim, dim // 2), TimeBlock(dim // 2, dim // 4), TimeBlock(dim // 4, dim // 4)
        self.db1, self.db2 = TimeBlock(dim // 4, dim // 2), TimeBlock(dim // 2, dim)
        self.mix = nn.Sequential(nn.Linear(TIME_DIM, TIME_DIM // 2), nn.ReLU(), nn.Linear(TIME_DIM // 2, 1), nn.Sigmoid())

    def forward(self, w_t: Tensor, features: Tensor, labels: Tensor, t: Tensor) -> Tensor:
        """(B, N, D) from w_t (B, N, D), support features (B, S, D) with labels (B, S), and t (B,)."""
        g = inner_gradient(w_t, features, labels)
        e = embedding(t)[:, None]
        x1 = F.softplus(self.eb1(g, e))
        x2 = F.softplus(self.eb2(x1, e))
        x3 = F.softplus(self.bb(x2, e)) + x2
        x4 = F.softplus(self.db1(x3, e)) + x1
        u = self.db2(x4, e) + g
        s = self.mix(e)
        return s * g + (1 - s) * u


def inner_gradient(w: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The gradient with respect to w of Eq. 11's squared distances, summed over the support set."""
    with torch.enable_grad():
        w = w.detach().requires_grad_()
        difference = features[:, :, None] - w[:, None]
        of_its_class = F.one_hot(labels, w.shape[1])
        loss = (difference.square().sum(-1) * of_its_class).sum()
        return torch.autograd.grad(loss, w)[0]


def embedding(t: Tensor) -> Tensor:
    """(B, 320): sinusoids of t (B,)."""
    half = TIME_DIM // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
    angles = t[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], -1)


class Textbook:
    """Algorithms 1 and 2, with a schedule of `num_steps`."""

    def __init__(self, dim: int, num_steps: int = 1000) -> None:
        self.denoiser = TextbookDenoiser(dim)
        self.beta = torch.linspace(1e-4, 0.02, num_steps)
        self.alpha = 1 - self.beta
        self.abar = torch.cumprod(self.alpha, 0)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr=1e-4, weight_decay=5e-4)

    def train_step(self, w_0: Tensor, features: Tensor, labels: Tensor) -> float:
        """Algorithm 1, lines 3 to 8; the loss."""
        t = torch.randint(len(self.beta), (len(w_0),))
        return self.descend(w_0, features, labels, t, torch.randn_like(w_0))

    def descend(self, w_0: Tensor, features: Tensor, labels: Tensor, t: Tensor, eps: Tensor) -> float:
        """A step of Adam on Eq. 12."""
        abar = self.abar[t][:, None, None]
        w_t = abar.sqrt() * w_0 + (1 - abar).sqrt() * eps
        loss = F.mse_loss(self.denoiser(w_t, features, labels, t), eps)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def sample(self, features: Tensor, labels: Tensor, w: Tensor) -> Tensor:
        """Algorithm 2 for one task: w_0 (N, D) from its support features (S, D), labels (S,) and w_T (N, D)."""
        for t in reversed(range(len(self.beta))):
            eps_hat = self.denoiser(w[None], features[None], labels[None], torch.tensor([t]))[0]
            alpha, beta, abar = self.alpha[t], self.beta[t], self.abar[t]
            w = (w - beta / (1 - abar).sqrt() * eps_hat) / alpha.sqrt()
        return w
