"""Support sets as rows of a bank of features: what an iteration needs of them is gathered, and nothing else."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from metadiff.learners import Support


class BankSupport(Support):
    """The support sets of B tasks, K examples of each of N classes: a `Support` whose features stay in a bank until they are asked for.

    The gradient of Eq. 11 asks for the class means alone, which are gathered and averaged in one pass: no (B, N K, D), no one-hot.

    Args:
        bank: (n, D) float features.
        rows: (B, N, K) int64 rows of the bank, on its device.
    """

    bank: Tensor
    rows: Tensor

    def __init__(self, bank: Tensor, rows: Tensor) -> None:
        # Support is frozen, and sets its attributes in the same way.
        vars(self).update(bank=bank, rows=rows, way=rows.shape[1])

    def __getitem__(self, tasks: slice) -> "BankSupport":
        """The support sets of some of the tasks."""
        return BankSupport(self.bank, self.rows[tasks])

    def to(self, device: torch.device | str) -> "BankSupport":
        """The same support sets on `device`, with all of their bank."""
        return BankSupport(self.bank.to(device), self.rows.to(device))

    @property
    def shot(self) -> int:
        """K."""
        return self.rows.shape[2]

    @cached_property
    def features(self) -> Tensor:  # type: ignore[override]  # read-only there, too
        """(B, N K, D), class by class."""
        return self.bank.index_select(0, self.rows.flatten()).view(len(self.rows), -1, self.bank.shape[1])

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        """(B, N K) int64."""
        return torch.arange(self.way, device=self.rows.device).repeat_interleave(self.shot).expand(len(self.rows), -1)

    @cached_property
    def counts(self) -> Tensor:
        """(B, N): K throughout."""
        return self.bank.new_full(self.rows.shape[:2], self.shot)

    @cached_property
    def size(self) -> Tensor:
        """(B,): N K throughout."""
        return self.bank.new_full(self.rows.shape[:1], self.way * self.shot)

    @cached_property
    def means(self) -> Tensor:
        """(B, N, D): the class means c_k."""
        if self.shot == 1:
            means = self.bank.index_select(0, self.rows.flatten())
        else:
            means = F.embedding_bag(self.rows.view(-1, self.shot), self.bank, mode="sum").div_(self.shot)  # faster than "mean"
        return means.view(*self.rows.shape[:2], -1)
