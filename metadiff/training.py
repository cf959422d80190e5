"""Training the denoiser: Algorithm 1 of MetaDiff (AAAI 2024) over any source of batches."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from metadiff.checkpoint import Checkpoints, load_state, save_state
from metadiff.config import config
from metadiff.denoiser import Denoiser
from metadiff.diffusion import Weighting, diffusion_loss, draw
from metadiff.errors import UserError
from metadiff.learners import Support
from metadiff.metrics import Log, write_row
from metadiff.parallel import ALONE, Ranks
from metadiff.schedule import Schedule

LOG_EVERY = 50
BatchSource = Callable[[int], Iterator[tuple[Tensor, Support]]]
"""Maps an iteration to the batches from there on: scaled targets w_0 (B, N, D) and the support sets of the same B tasks.

With several ranks these are a rank's own tasks: its `Ranks.share` of the `TrainConfig.batch_size` tasks of each iteration.
"""


@config
class TrainConfig:
    """Optimisation of Eq. 12. The defaults suit one machine; the paper trains 300,000 iterations of 8 tasks (Section 5.2)."""

    iterations: Annotated[int, Field(ge=1)] = 3000
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Tasks in one iteration."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Annotated[int, Field(ge=0)] = 0
    """Iterations over which the rate rises from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights that is used for sampling; null samples from the weights themselves."""
    ema_start: Annotated[int, Field(ge=0)] = 0
    """Iteration from which on to average."""
    loss_weighting: Weighting = "eps"
    checkpoint_every: Annotated[int, Field(ge=LOG_EVERY, multiple_of=LOG_EVERY)] = 500

    @model_validator(mode="after")
    def _average_starts_in_time(self) -> "TrainConfig":
        if self.ema_decay is not None and self.ema_start >= self.iterations:
            raise ValueError(
                f"ema_start={self.ema_start} is not below iterations={self.iterations}; start earlier, or set ema_decay to null"
            )
        return self


def train(
    denoiser: Denoiser,
    schedule: Schedule,
    batches: BatchSource,
    settings: TrainConfig,
    seed: int,
    path: Path,
    label: str,
    *,
    ranks: Ranks = ALONE,
    log: Log | None = None,
) -> None:
    """Train `denoiser` and write its sampling weights to `<path>.safetensors` and its losses to `<path>.jsonl`.

    Checkpoints beside them make a killed run continue to the very same weights (bit for bit on the CPU, with as many ranks as before):
    batches, times and noises depend on the iteration's number alone. What is trained already is left alone.

    Args:
        ranks: those that train together; all of them call this with the same arguments but for `batches`.
        log: is given each row of losses beside the file, on rank 0.

    Raises:
        UserError: the loss is no longer finite, or the ranks cannot share a batch equally.
        Superseded: a newer attempt trains the same now.
    """
    weights, rows = path.with_name(path.name + ".safetensors"), path.with_name(path.name + ".jsonl")
    checkpoints = Checkpoints(path.parent, f"{path.name}.checkpoint", ranks)
    ranks.share(settings.batch_size, "train.batch_size")
    if ranks.agree(weights.exists()):
        return checkpoints.clear()
    if not any(True for _ in denoiser.parameters()):
        # Table 3's raw gradient has nothing to learn.
        return save_state(weights, {"denoiser": {}}) if ranks.first else None
    state = _TrainingState(denoiser, settings, ranks)
    losses = torch.zeros((), device=state.device)
    for done, loss in _steps(state, state.resume(checkpoints), schedule, batches, seed, label):
        losses += loss
        if done % LOG_EVERY == 0 or done == settings.iterations:
            index, window = (done - 1) // LOG_EVERY, (done - 1) % LOG_EVERY + 1
            row = {"iteration": done, "loss": _finite(float(ranks.mean(losses)) / window, label, done)}
            if checkpoints.writable():
                write_row(rows, index, row)
                if log:
                    log(done, row)
            losses.zero_()
        if done % settings.checkpoint_every == 0:
            checkpoints.save(done, state.state())
    if checkpoints.writable():
        save_state(weights, {"denoiser": state.sampling_weights()})
    checkpoints.clear()


def load_denoiser(path: Path, denoiser: Denoiser) -> Denoiser:
    """`denoiser` with the sampling weights that `train` left, in evaluation mode.

    Raises:
        UserError: the weights belong to another architecture or another number of feature dimensions.
    """
    try:
        denoiser.load_state_dict(load_state(path)["denoiser"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"denoiser {path}: does not fit the features or the denoiser section ({reason}); train again with --force"
        ) from None
    return denoiser.eval()


class _TrainingState:
    """All that changes while training: weights, their average, optimizer, rate."""

    def __init__(self, denoiser: Denoiser, settings: TrainConfig, ranks: Ranks = ALONE) -> None:
        self.settings, self.ranks, self.denoiser, self.network = settings, ranks, denoiser, ranks.wrap(denoiser)
        self.device = next(denoiser.parameters()).device
        self.optimizer = torch.optim.Adam(denoiser.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.average = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay)) if settings.ema_decay else None

    def step(self, loss: Tensor, iteration: int) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        if self.average and iteration >= self.settings.ema_start:
            self.average.update_parameters(self.denoiser)

    def sampling_weights(self) -> dict[str, Tensor]:
        return (self.average.module if self.average else self.denoiser).state_dict()

    def _rate(self, iteration: int) -> float:
        rise = min(1.0, (iteration + 1) / self.settings.warmup) if self.settings.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * iteration / self.settings.iterations)) if self.settings.decay == "cosine" else 1.0
        return rise * fall

    def _parts(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"denoiser": self.denoiser, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return parts | ({"average": self.average} if self.average else {})

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def resume(self, checkpoints: Checkpoints) -> int:
        """Take up where a killed run stood: the iterations done."""
        done, state = checkpoints.resume()
        for name, part in self._parts().items() if done else ():
            part.load_state_dict(state[name])
        return done


def _steps(
    state: _TrainingState, start: int, schedule: Schedule, batches: BatchSource, seed: int, label: str
) -> Iterator[tuple[int, Tensor]]:
    """Algorithm 1 from iteration `start` on: after each step, the iterations done and this rank's loss."""
    settings, ranks, source = state.settings, state.ranks, batches(start)
    shown: dict[str, Any] = {"initial": start, "unit": "it", "mininterval": 1.0, "disable": not ranks.first}
    for iteration in tqdm(range(start, settings.iterations), label, settings.iterations, **shown):
        w_0, support = next(source)
        t, eps = draw(_generator(seed, iteration, state.device), w_0, schedule.num_steps, ranks)
        loss = diffusion_loss(state.network, schedule, w_0, support, t, eps, settings.loss_weighting)
        state.step(loss, iteration)
        yield iteration + 1, loss.detach()


def _generator(seed: int, iteration: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1))


def _finite(loss: float, label: str, iteration: int) -> float:
    if not math.isfinite(loss):
        raise UserError(f"{label}: the loss is {loss} at iteration {iteration}; lower train.learning_rate")
    return loss
