"""What can be known to be wrong before the first image is decoded, rather than after hours of training."""

from collections.abc import Collection

import numpy as np

from metadiff import artifact
from metadiff.backbones import build_backbone, feature_dim
from metadiff.calibration import sampled
from metadiff.denoiser import build_denoiser
from metadiff.episodes import EpisodeSampler
from metadiff.errors import UserError
from metadiff.images import ImageSet
from metadiff.learners import build_learner
from metadiff.pipeline import Config, artifact_path
from metadiff.samplers import SamplerConfig
from metadiff.schedule import Schedule
from metadiff.scoring import GATE_SPLIT, traced_sampler
from metadiff.stages import STAGES
from metadiff.targets import check_targets


def check(settings: Config, wanted: Collection[str], forced: Collection[str] = ()) -> None:
    """Hold the configuration of the stages in `wanted` against the data set, or the images already prepared unless those are `forced` anew.

    Raises:
        UserError: the first thing that a later stage would stumble over.
    """
    labels = _labels(settings, "prepare" in forced)
    if "pretrain" in wanted:
        feature_dim(build_backbone(settings.pretrain.backbone, 0), settings.prepare.image_size)
        if settings.pretrain.batch_size > len(labels["base"]):
            raise UserError(
                f"pretrain.batch_size={settings.pretrain.batch_size}: the base split has only {len(labels['base'])} images; lower it"
            )
    if "fit_targets" in wanted:
        check_targets(settings.targets, build_learner(settings.learner))
        _check_episodes(settings, "base", labels)
    if "train" in wanted:
        build_denoiser(settings.denoiser, 8, build_learner(settings.learner), Schedule(settings.schedule))
    if "evaluate" in wanted:
        _check_episodes(settings, settings.evaluate.split, labels)
        Schedule(settings.schedule).timesteps(settings.sampler.steps)
        if settings.evaluate.sampler == "auto":
            _check_gate(settings, labels)
        if settings.evaluate.ensemble:
            sampled(traced_sampler(settings))


def _check_episodes(settings: Config, split: str, labels: dict[str, np.ndarray]) -> None:
    if split not in labels:
        raise UserError(f"evaluate.split={split!r}: the data set has only {', '.join(labels)}; give it that split, or set evaluate.split")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(labels[split]))])
    EpisodeSampler(offsets, settings.episodes.way, max(settings.episodes.shots), settings.episodes.query, settings.seed, f"split {split!r}")


def _check_gate(settings: Config, labels: dict[str, np.ndarray]) -> None:
    for option in ("method", "steps", "spacing", "stochastic", "eq8_as_printed"):
        if getattr(settings.sampler, option) != getattr(SamplerConfig(), option):
            raise UserError(
                f"sampler.{option}={getattr(settings.sampler, option)!r} does not go with evaluate.sampler=auto, which chooses it; "
                "leave it out, or set evaluate.sampler=given"
            )
    if GATE_SPLIT not in labels:
        raise UserError(
            f"evaluate.sampler=auto is decided on the split {GATE_SPLIT!r}, but the data set has only {', '.join(labels)}; "
            "give it that split, or set evaluate.sampler=given"
        )
    _check_episodes(settings, GATE_SPLIT, labels)


def _labels(settings: Config, afresh: bool) -> dict[str, np.ndarray]:
    """The class of each image, by split: of the prepared images where they are there, else as the data set lists them."""
    path = artifact_path(settings, "prepare", STAGES["prepare"])
    if artifact.exists(path) and not afresh:
        return {split: images.labels for split, images in ImageSet.open_all(artifact.read(path)).items()}
    return {split: np.asarray(source.labels) for split, source in settings.data.sources(settings.seed).items()}
