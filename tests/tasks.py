"""Training batches without images, cut into the ranks' shares."""

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from metadiff.learners import Support
from metadiff.parallel import Ranks

WAY, SHOT, DIM = 3, 2, 16


def batches(ranks: Ranks, size: int, start: int) -> Iterator[tuple[Tensor, Support]]:
    """A rank's share of targets scattered like small features, and supports scattered around them, from iteration `start` on."""
    share = ranks.share(size)
    for iteration in count(start):
        generator = torch.Generator().manual_seed(iteration)
        w_0 = 0.1 * torch.randn(size, WAY, DIM, generator=generator)
        features = w_0.repeat_interleave(SHOT, 1) + 0.05 * torch.randn(size, WAY * SHOT, DIM, generator=generator)
        labels = torch.arange(WAY).repeat_interleave(SHOT).expand(size, -1)
        yield w_0[share], Support(features, labels, WAY)[share]
