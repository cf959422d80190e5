"""Data parallelism: one training in several processes, each with its share of every batch, over torch.distributed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from metadiff.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together: alone, unless said otherwise.

    With more than one, torch.distributed's default group (gloo on CPUs, nccl on GPUs) has been set up. Sums over a batch are then the
    same up to rounding, but for batch norm: its statistics are each rank's own share's, and the running ones that are kept are rank 0's.

    Attributes:
        rank: 0 .. world - 1.
        world: the number of processes.
        device: where this process computes; None leaves that to the caller.
        elastic: whether `world` may be another one when the training goes on after an interruption.
        notice: tells whether the ranks are likely to be stopped soon, because a machine of theirs is about to be taken away, say; called by
            all of them alike, of whose answers rank 0's counts. None: nobody would tell.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    elastic: bool = False
    notice: Callable[[], bool] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def share(self, size: int, option: str = "batch_size") -> slice:
        """This rank's part of a global batch: contiguous, and as large as the others'; if `elastic`, as nearly as can be.

        Raises:
            UserError: `size`, which the user set by `option`, is not a multiple of the number of processes; if `elastic`, is below it.
        """
        if self.elastic:
            if size < self.world:
                raise UserError(
                    f"{option}={size}: leaves some of {self.world} workers without a part; "
                    f"set it to {self.world} or more, or lower ray.num_workers"
                )
        elif size % self.world:
            raise UserError(
                f"{option}={size}: cannot be shared equally by {self.world} workers; "
                f"set it to a multiple of {self.world}, or change ray.num_workers"
            )
        return slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def weight(self, size: int) -> float:
        """What to multiply the mean over this rank's `share` by, so that `mean` over the ranks is the global batch's; 1 if all are equal.

        The same holds for the gradient of such a mean, which `wrap` averages.
        """
        share = self.share(size)
        return self.world * (share.stop - share.start) / size

    def wrap(self, module: nn.Module) -> nn.Module:
        """`module` with gradients that `backward` averages over the ranks; call it, rather than its methods."""
        return DistributedDataParallel(module) if self.world > 1 else module

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks, on every one of them."""
        if self.world == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def agree(self, number: int) -> int:
        """Rank 0's `number`, on every rank: what the ranks must not decide each for itself."""
        if self.world == 1:
            return number
        shared = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(shared, src=0)
        return int(shared)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()
