"""Pretraining the backbone as one classifier over all base classes (Chen et al. 2021, "Classifier-Baseline")."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from tqdm import tqdm

from metadiff.backbones import BackboneName
from metadiff.checkpoint import Checkpoints, load_state, save_state
from metadiff.config import config
from metadiff.errors import UserError
from metadiff.images import AugmentConfig, Batch, ImageLoader
from metadiff.metrics import Log, read_rows, write_row
from metadiff.parallel import ALONE, Ranks

CHECKPOINT = "checkpoint"
BACKBONE = "backbone.safetensors"
METRICS = "metrics.jsonl"


@config
class PretrainConfig:
    """The Classifier-Baseline recipe; the defaults are those of its mini-ImageNet runs, with Nesterov's momentum."""

    backbone: BackboneName = "conv4"
    epochs: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=2)] = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay: Literal["steps", "cosine"] = "steps"
    """`steps` divides the rate by 10 at `milestones`; `cosine` takes it to zero, batch by batch."""
    milestones: tuple[int, ...] = (90,)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rotation_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the rotation loss: every image also turned by 90, 180 and 270 degrees, the turn to be told; 0 is off."""
    precision: Literal["fp32", "bf16"] = "bf16"
    augment: AugmentConfig = AugmentConfig()
    validate_every: Annotated[int, Field(ge=1)] = 1
    """Epochs between validations; the best validated weights are kept, or the last where there are no validation classes."""


class Classifier(nn.Module):
    """A backbone with a linear head over the base classes and, for self-supervision, one over four rotations."""

    def __init__(self, backbone: nn.Module, feature_dim: int, num_classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head = nn.Linear(feature_dim, num_classes)
            self.rotation_head = nn.Linear(feature_dim, 4)

    def forward(self, images: torch.Tensor, labels: torch.Tensor, label_smoothing: float, rotation_weight: float) -> torch.Tensor:
        """The loss: mean cross-entropy over the base classes, plus the weighted rotation loss."""
        if not rotation_weight:
            return F.cross_entropy(self.head(self.backbone(images)), labels, label_smoothing=label_smoothing)
        turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
        features = self.backbone(turned.contiguous(memory_format=torch.channels_last))
        turns = torch.arange(4, device=labels.device).repeat_interleave(len(labels))
        class_loss = F.cross_entropy(self.head(features), labels.repeat(4), label_smoothing=label_smoothing)
        return class_loss + rotation_weight * F.cross_entropy(self.rotation_head(features), turns)


def pretrain(
    classifier: Classifier,
    loader: ImageLoader,
    settings: PretrainConfig,
    folder: Path,
    device: torch.device,
    validate: Callable[[nn.Module], float] | None,
    *,
    ranks: Ranks = ALONE,
    log: Log | None = None,
) -> None:
    """Train `classifier` and leave `backbone.safetensors` and `metrics.jsonl` in `folder`.

    A checkpoint after every epoch makes a killed run continue where it stood, to the same weights.

    Args:
        loader: batches of `batch_size` images; with several ranks, a rank's own share of each.
        validate: maps the backbone to its accuracy on validation classes; None where there are none. Called on rank 0, while others wait.
        ranks: those that train together; all of them call this with the same arguments but for `loader`.
        log: is given each epoch's row beside the file, on rank 0.

    Raises:
        UserError: the loss is no longer finite, or the ranks cannot share a batch equally.
        Superseded: a newer attempt trains the same now.
    """
    ranks.share(settings.batch_size, "pretrain.batch_size")
    classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoints = Checkpoints(folder, CHECKPOINT, ranks)
    if ranks.agree((folder / METRICS).exists() and len(read_rows(folder / METRICS)) == settings.epochs):
        return checkpoints.clear()
    state = _PretrainingState(classifier, settings, loader.steps_per_epoch, ranks)
    for epoch in range(state.resume(checkpoints), settings.epochs):
        began = time.perf_counter()
        loss = _train_epoch(state, loader, epoch, settings, device, ranks)
        if checkpoints.writable():
            row: dict[str, Any] = {"epoch": epoch + 1, "loss": loss, "learning_rate": float(state.scheduler.get_last_lr()[0])}
            if (epoch + 1) % settings.validate_every == 0 or epoch + 1 == settings.epochs:
                row |= _keep_the_best(state, validate, folder)
            row["seconds"] = round(time.perf_counter() - began, 2)
            write_row(folder / METRICS, epoch, row)
            if log:
                log(epoch + 1, row)
        checkpoints.save(epoch + 1, state.state())
        ranks.barrier()
    checkpoints.clear()


def load_backbone(path: Path, backbone: nn.Module) -> nn.Module:
    """`backbone` with the weights that `pretrain` left, in evaluation mode.

    Raises:
        UserError: the weights are another architecture's, or no backbone's.
    """
    try:
        backbone.load_state_dict(load_state(path)["backbone"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone {path}: not weights of {type(backbone).__name__} ({reason}); expected what pretrain left for it"
        ) from None
    return backbone.eval()


class _PretrainingState:
    """All that changes while pretraining: weights, optimizer, rate, and the best validation accuracy so far."""

    def __init__(self, classifier: Classifier, settings: PretrainConfig, steps_per_epoch: int, ranks: Ranks) -> None:
        # What has no part in the loss must not be waited for.
        classifier.rotation_head.requires_grad_(settings.rotation_weight > 0)
        self.classifier, self.network, self.best = classifier, ranks.wrap(classifier), 0.0
        self.optimizer = torch.optim.SGD(
            classifier.parameters(),
            settings.learning_rate,
            settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.momentum > 0,
        )
        self.scheduler = _scheduler(self.optimizer, settings, steps_per_epoch)

    def _parts(self) -> dict[str, Any]:
        return {"classifier": self.classifier, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def state(self) -> dict[str, Any]:
        return {"best": self.best} | {name: part.state_dict() for name, part in self._parts().items()}

    def resume(self, checkpoints: Checkpoints) -> int:
        """Take up where a killed run stood: the epochs done."""
        done, state = checkpoints.resume()
        if done:
            self.best = state["best"]
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
        return done

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()


def _scheduler(optimizer: torch.optim.Optimizer, settings: PretrainConfig, steps_per_epoch: int) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.decay == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * steps_per_epoch)
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in settings.milestones])


def _train_epoch(
    state: _PretrainingState, loader: ImageLoader, epoch: int, settings: PretrainConfig, device: torch.device, ranks: Ranks
) -> float:
    """The epoch's mean loss over all ranks."""
    state.network.train()
    total = torch.zeros((), device=device)
    batches: Iterator[Batch] = loader.epoch(epoch)
    shown: dict[str, Any] = {"total": loader.steps_per_epoch, "unit": "batch", "mininterval": 1.0, "disable": not ranks.first}
    for images, labels in tqdm(batches, f"pretrain {epoch + 1}/{settings.epochs}", **shown):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = state.network(
                images.to(device, non_blocking=True), labels.to(device), settings.label_smoothing, settings.rotation_weight
            )
        state.step(loss)
        total += loss.detach().float()
    mean = float(ranks.mean(total)) / loader.steps_per_epoch
    if not math.isfinite(mean):
        raise UserError(f"pretrain: the loss is {mean} in epoch {epoch + 1}; lower pretrain.learning_rate, or set pretrain.precision=fp32")
    return mean


def _keep_the_best(state: _PretrainingState, validate: Callable[[nn.Module], float] | None, folder: Path) -> dict[str, float]:
    """Validate, and save the backbone unless an earlier one was better."""
    row = {"val_accuracy": validate(state.classifier.backbone)} if validate else {}
    accuracy = row.get("val_accuracy", state.best)
    if accuracy >= state.best:
        state.best = accuracy
        save_state(folder / BACKBONE, {"backbone": state.classifier.backbone.state_dict()})
    return row
