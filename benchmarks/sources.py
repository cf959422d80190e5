"""Training from the bank of features beside training from images, which are augmented and go through the frozen backbone each time."""

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tasks import LEARNER, SEED, SHOT, WAY, Tasks
from metadiff.backbones import build_backbone
from metadiff.batches import FeatureSource, ImageSource
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.episode_images import EpisodePlan, MemoryEpisodes
from metadiff.episodes import EpisodeSampler, TaskSchedule
from metadiff.features import EmbedConfig, FeatureBank, FeaturesConfig, FeatureTransform, embed_images
from metadiff.images import AugmentConfig, ImageSet
from metadiff.learners import Support
from metadiff.optimisation import Optimisation, TrainConfig
from metadiff.schedule import Schedule
from metadiff.targets import Targets, class_means

CLASSES, IMAGES, SIDE, TASKS, BATCH = 8, 24, 84, 200, 8
CPU = torch.device("cpu")


def features_over_images(tasks: Tasks, options: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """Tasks a second of the whole iteration, batches included: 84 x 84 images of noise in memory, a Conv4, eight tasks a batch."""
    side, offsets = 32 if options.quick else SIDE, np.arange(CLASSES + 1) * IMAGES
    pixels = np.random.default_rng(SEED).integers(0, 256, (CLASSES * IMAGES, side, side, 3), dtype=np.uint8)
    images, backbone = ImageSet(pixels, np.repeat(np.arange(CLASSES), IMAGES), tuple("abcdefgh")), build_backbone("conv4", SEED).eval()
    raw = np.concatenate(list(embed_images(images.images, backbone, EmbedConfig(), None, 0, CPU)))
    transform = FeatureTransform.fit(raw, FeaturesConfig())
    means = class_means(transform(raw), offsets).numpy()
    targets = Targets(means, EpisodeSampler(offsets, WAY, 1, 1, SEED).classes(np.arange(TASKS)), 1.0)
    plan = EpisodePlan(EpisodeSampler(offsets, WAY, SHOT, 1, SEED), TaskSchedule(TASKS, SEED), BATCH)
    bank = FeatureSource(FeatureBank(raw[None], offsets, images.classes), transform, targets, SEED, CPU)
    seen = ImageSource(lambda plan: MemoryEpisodes(images, plan, AugmentConfig(), SEED), backbone, transform, targets, "fp32", CPU)
    speeds = trained({"features": bank.batches(plan, 0), "images": seen.batches(plan, 0)}, targets.dim, options.rounds)
    each = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "features_over_images": round(statistics.median(a / b for a, b in zip(speeds["features"], speeds["images"], strict=True)), 1),
        **{f"source_tasks_per_s_{name}": round(value, 1) for name, value in each.items()},
    }


def trained(sources: dict[str, Iterator[tuple[Tensor, Support]]], dim: int, rounds: int) -> dict[str, list[float]]:
    """Tasks a second in each round, the sources taking turns."""
    schedule, speeds = Schedule(), {name: [] for name in sources}
    states = {}
    for name in sources:
        denoiser = build_denoiser(DenoiserConfig(), dim, LEARNER, schedule)
        states[name] = Optimisation(denoiser, schedule, TrainConfig(batch_size=BATCH), SEED)
    for turn in range(rounds + 1):
        for name, source in sources.items():
            repeats = 20 if name == "features" else 1
            began = time.perf_counter()
            for step in range(repeats):
                states[name].iterate(turn * repeats + step, *next(source))
            if turn:
                speeds[name].append(repeats * BATCH / (time.perf_counter() - began))
    return speeds
