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

from metadiff.checkpoint import load_state, save_state
from metadiff.config import config
from metadiff.denoiser import Denoiser
from metadiff.diffusion import Weighting, diffusion_loss, draw
from metadiff.errors import UserError
from metadiff.learners import Support
from metadiff.metrics import write_row
from metadiff.schedule import Schedule

LOG_EVERY = 50
BatchSource = Callable[[int], Iterator[tuple[Tensor, Support]]]
"""Maps an iteration to the batches from there on: scaled targets w_0 (B, N, D) and the support sets of the same B tasks."""


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


def train(denoiser: Denoiser, schedule: Schedule, batches: BatchSource, settings: TrainConfig, seed: int, path: Path, label: str) -> None:
    """Train `denoiser` and write its sampling weights to `<path>.safetensors` and its losses to `<path>.jsonl`.

    Checkpoints beside them make a killed run continue to the very same weights (bit for bit on the CPU): batches, times and noises
    depend on the iteration's number alone. What is trained already is left alone.

    Raises:
        UserError: the loss is no longer finite.
    """
    weights, checkpoint, log = (path.with_name(path.name + suffix) for suffix in (".safetensors", ".checkpoint.safetensors", ".jsonl"))
    if weights.exists():
        return checkpoint.unlink(missing_ok=True)
    if not any(True for _ in denoiser.parameters()):
        # Table 3's raw gradient has nothing to learn.
        return save_state(weights, {"denoiser": {}})
    state = _TrainingState(denoiser, settings)
    start = state.restore(checkpoint) if checkpoint.exists() else 0
    device = next(denoiser.parameters()).device
    losses = torch.zeros((), device=device)
    source = batches(start)
    for iteration in tqdm(range(start, settings.iterations), label, settings.iterations, initial=start, unit="it", mininterval=1.0):
        w_0, support = next(source)
        t, eps = draw(_generator(seed, iteration, device), w_0, schedule.num_steps)
        loss = diffusion_loss(denoiser, schedule, w_0, support, t, eps, settings.loss_weighting)
        state.step(loss, iteration)
        losses += loss.detach()
        done = iteration + 1
        if done % LOG_EVERY == 0 or done == settings.iterations:
            index, window = (done - 1) // LOG_EVERY, (done - 1) % LOG_EVERY + 1
            write_row(log, index, {"iteration": done, "loss": _finite(float(losses) / window, label, done)})
            losses.zero_()
        if done % settings.checkpoint_every == 0:
            state.save(checkpoint, done)
    save_state(weights, {"denoiser": state.sampling_weights()})
    checkpoint.unlink(missing_ok=True)


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

    def __init__(self, denoiser: Denoiser, settings: TrainConfig) -> None:
        self.settings, self.denoiser = settings, denoiser
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

    def save(self, path: Path, iteration: int) -> None:
        save_state(path, {"iteration": iteration} | {name: part.state_dict() for name, part in self._parts().items()})

    def restore(self, path: Path) -> int:
        state = load_state(path)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        return state["iteration"]


def _generator(seed: int, iteration: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence([seed, iteration]).generate_state(1, np.uint64)[0] >> 1))


def _finite(loss: float, label: str, iteration: int) -> float:
    if not math.isfinite(loss):
        raise UserError(f"{label}: the loss is {loss} at iteration {iteration}; lower train.learning_rate")
    return loss
