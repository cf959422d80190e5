"""MetaDiff as a classifier: a few labelled images of new classes in, predictions out, from a finished run."""

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from metadiff import artifact
from metadiff.artifact import Artifact
from metadiff.backbones import build_backbone
from metadiff.checkpoint import load_state
from metadiff.config import validate
from metadiff.datasets.tree import decode_rgb
from metadiff.denoiser import Denoiser, DenoiserConfig, build_denoiser
from metadiff.episodes import EpisodeConfig
from metadiff.errors import UserError
from metadiff.evaluation import start_noise
from metadiff.features import EmbedConfig, FeatureTransform, embed_images
from metadiff.images import fit_to_square
from metadiff.learners import LearnerConfig, Support, build_learner
from metadiff.machine import MachineConfig, set_up
from metadiff.pretraining import BACKBONE, load_backbone
from metadiff.samplers import SamplerConfig, sample
from metadiff.schedule import Schedule, ScheduleConfig
from metadiff.targets import Targets
from metadiff.training import load_denoiser

ImageLike = Image.Image | np.ndarray | str | Path
T = TypeVar("T")


class MetaDiffClassifier:
    """Learns classes it has never seen from a few images of each, by denoising a classifier's weights (Algorithm 2).

        classifier = MetaDiffClassifier("runs/glyphs").fit(images, labels)
        classifier.predict(new_images)

    Args:
        run: the folder of a finished run (`<run.dir>/<run.name>`), trained at least up to the stage `train`.
        variant: which of the run's trainings to use.
        machine: device and threads.
        seed: of the Gaussian start w_T, and of z.
        sampler: how to denoise. Where None: with all steps of Eq. 8, or the few-step sampler that the run's evaluation found to lose
            nothing beside them (`evaluate.sampler: auto`), where way and shots are those that it was tried with.

    Attributes:
        classes_: the labels seen by `fit`, sorted.
    """

    def __init__(
        self,
        run: str | Path,
        variant: str = "stable",
        machine: MachineConfig | None = None,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
    ) -> None:
        """Open the run.

        Raises:
            UserError: a stage is missing, or was made from another than the one that is there; or `sampler` has too many steps.
        """
        self._device, self._seed = set_up(machine or MachineConfig()), seed
        stages = {name: artifact.read(Path(run) / name) for name in ("prepare", "pretrain", "embed")}
        self._targets, self._train = (artifact.read(Path(run) / name / variant) for name in ("fit_targets", "train"))
        _check_chain(stages | {"fit_targets": self._targets, "train": self._train})
        self._image_size: int = stages["prepare"].manifest["config"]["prepare"]["image_size"]
        backbone = build_backbone(stages["pretrain"].manifest["config"]["pretrain"]["backbone"], 0)
        self._backbone = load_backbone(stages["pretrain"].file(BACKBONE), backbone).to(self._device)
        self._transform = FeatureTransform(**load_state(self._targets.file("transform.safetensors")))
        self._learner = build_learner(_section(LearnerConfig, self._train, "learner"))
        self._schedule = Schedule(_section(ScheduleConfig, self._train, "schedule"), self._device)
        self._schedule.timesteps(sampler.steps if sampler else None)
        self._episodes = _section(EpisodeConfig, self._train, "episodes")
        self._sampler, self._gated = sampler, _gated_samplers(Path(run) / "evaluate" / variant, self._train)
        self.classes_: list[Any] = []

    def fit(self, images: Sequence[ImageLike], labels: Sequence[Hashable]) -> "MetaDiffClassifier":
        """Learn from n labelled images: paths, PIL images or (H, W, 3) uint8 arrays; at least two classes, any number of each.

        Raises:
            UserError: numbers of images and labels differ, fewer than two classes, or an image that cannot be read.
        """
        if len(images) != len(labels):
            raise UserError(f"fit: {len(images)} images but {len(labels)} labels; give one label an image")
        classes = sorted(set(labels), key=str)
        if len(classes) < 2:
            raise UserError(f"fit: {len(classes)} class; give images of at least two")
        ways = torch.tensor([classes.index(label) for label in labels])
        support = Support.of(self._features(images)[None], ways[None].to(self._device), len(classes))
        shot = self._nearest_shot(len(labels) / len(classes))
        denoiser, sampler = self._denoiser(shot), self._sampler or self._chosen_sampler(support, shot)
        w_T = start_noise(np.array([0]), support.way, support.features.shape[-1], self._seed).to(self._device)
        noise = torch.Generator(self._device).manual_seed(self._seed) if sampler.stochastic else None
        self._w = sample(denoiser, self._schedule, support, w_T, sampler, noise) / denoiser.target_scale
        self.classes_ = classes
        return self

    def predict(self, images: Sequence[ImageLike]) -> list[Any]:
        """The label of each image."""
        return [self.classes_[way] for way in self.predict_proba(images).argmax(1)]

    def predict_proba(self, images: Sequence[ImageLike]) -> np.ndarray:
        """(n, classes) probabilities, in the order of `classes_` (Eq. 9).

        Raises:
            UserError: before `fit`, or an image that cannot be read.
        """
        if not self.classes_:
            raise UserError("predict: nothing learned yet; call fit(images, labels) first")
        logits = self._learner.logits(self._w, self._features(images)[None])[0]
        return logits.softmax(-1).cpu().numpy()

    def _features(self, images: Sequence[ImageLike]) -> torch.Tensor:
        if not len(images):
            raise UserError("no images given; give at least one")
        pixels = np.stack([fit_to_square(_open(image), self._image_size) for image in images])
        raw = np.concatenate(list(embed_images(pixels, self._backbone, EmbedConfig(), None, 0, self._device)))
        return self._transform(raw).to(self._device)

    def _nearest_shot(self, shot: float) -> int:
        """The nearest number of shots that there is a denoiser for."""
        return min(self._episodes.shots, key=lambda trained: abs(trained - shot))

    def _denoiser(self, shot: int) -> Denoiser:
        targets = Targets.open(self._targets)
        options = _section(DenoiserConfig, self._train, "denoiser")
        denoiser = build_denoiser(options, targets.dim, self._learner, self._schedule, targets.scale)
        return load_denoiser(self._train.file(f"{shot}shot.safetensors"), denoiser).to(self._device)

    def _chosen_sampler(self, support: Support, shot: int) -> SamplerConfig:
        tried = support.way == self._episodes.way and bool((support.counts == shot).all())
        return self._gated.get(shot, SamplerConfig()) if tried else SamplerConfig()


def _section(cls: type[T], made: Artifact, name: str) -> T:
    return validate(cls, made.manifest["config"][name], str(made.path))


def _gated_samplers(path: Path, train: Artifact) -> dict[int, SamplerConfig]:
    """By number of shots, the few-step samplers that the evaluation of these very denoisers let through its gate."""
    if not artifact.exists(path):
        return {}
    made = artifact.read(path)
    if made.manifest["inputs"]["train"] != train.content:
        return {}  # of denoisers that were trained anew since
    records = json.loads(made.file("results.json").read_text()).get("sampler", {})
    return {int(shot): validate(SamplerConfig, record["taken"], str(path)) for shot, record in records.items() if record["gated"]}


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        return decode_rgb(Path(image).read_bytes(), str(image))
    except OSError as error:
        raise UserError(f"image {image}: cannot be read ({error}); give a readable image file") from None


def _check_chain(stages: Mapping[str, Artifact]) -> None:
    """Weights of one backbone on features of another would be wrong without a word."""
    for name, made in stages.items():
        for source, content in made.manifest["inputs"].items():
            if source in stages and stages[source].content != content:
                raise UserError(f"artifact {made.path}: made from another {source}, which was redone since; run the stage {name} again")
