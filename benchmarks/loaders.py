"""What an augmented image costs: this project's FFCV loader beside torch's DataLoader with PIL and torchvision, on the same JPEG files.

    python -m benchmarks.loaders [--data mini-imagenet.zip] [--images 2000] [--rounds 5] [--workers 2]

Both shuffle, decode, crop and resize at random, flip, normalise and hand out batches of 100 float images of 84 x 84 pixels. CPU seconds are
those of the process and of the DataLoader's workers; starting the workers and compiling are left out. The ratio of jpg is between the same
compressed images, raw's is for those who spend the disk. The last line is one JSON object.
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from distributed.beton import BetonConfig, beton_name, write_beton
from distributed.loaders import FFCVLoader, LoaderConfig
from metadiff.artifact import Artifact, commit, workspace
from metadiff.images import MEAN, STD, AugmentConfig, ImageSet, fit_to_square
from metadiff.machine import MachineConfig, set_up

SIZE, BATCH, QUALITY, LIMIT = 84, 100, 90, 2.5
AUGMENT = AugmentConfig(crop="resized", flip=True)


class JpegFiles(Dataset):
    """The baseline's data set: one file an image, decoded by PIL, transformed by torchvision."""

    def __init__(self, folder: Path, count: int) -> None:
        self.paths = [folder / f"{index}.jpg" for index in range(count)]
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, scale=(0.35, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), index


def main(arguments: list[str]) -> int:
    """Measure, and print the ratios; 1 if that of jpg is below the limit."""
    options = parsed(arguments)
    set_up(MachineConfig(num_threads=1))
    with tempfile.TemporaryDirectory() as name:
        measured, compiling_s = measure(Path(name), options)
    cpu_us = {name: statistics.median(cpu for cpu, _ in rounds) / options.images * 1e6 for name, rounds in measured.items()}
    per_s = {name: options.images / statistics.median(wall for _, wall in rounds) for name, rounds in measured.items()}
    ratios = {name: cpu_us["dataloader"] / cpu_us[name] for name in ("jpg", "raw")}
    for name in measured:
        print(f"{name:>10}: {cpu_us[name]:6.1f} us of CPU an image, {per_s[name]:6.0f} images/s")
    result: dict[str, Any] = {"ffcv_over_dataloader": round(ratios["jpg"], 2), "ffcv_raw_over_dataloader": round(ratios["raw"], 2)}
    result |= {"cpu_us_per_image": rounded(cpu_us), "images_per_s": rounded(per_s), "compiling_cpu_s": rounded(compiling_s)}
    print(json.dumps(result | {"images": options.images, "rounds": options.rounds, "workers": options.workers, "cores": os.cpu_count()}))
    return 0 if ratios["jpg"] >= LIMIT else 1


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders")
    parser.add_argument("--data", type=Path, help="a zip of JPEG images; without it they are made")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of the DataLoader; FFCV decodes with one thread")
    return parser.parse_args(arguments)


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[tuple[float, float]]], dict[str, float]]:
    """(CPU seconds, seconds) of each round of each loader, the rounds taking turns; and the CPU seconds that compiling took."""
    jpegs = from_zip(options.data, options.images) if options.data else [natural(seed) for seed in range(options.images)]
    for index, jpeg in enumerate(jpegs):
        (folder / f"{index}.jpg").write_bytes(jpeg)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs])
    baseline = DataLoader(
        JpegFiles(folder, len(jpegs)), BATCH, shuffle=True, num_workers=options.workers, persistent_workers=options.workers > 0
    )
    # Before FFCV is imported: the workers are forks of a process without its threads.
    sources: dict[str, Callable[[int], Iterable[Any]]] = {"dataloader": lambda epoch: baseline}
    show(sources["dataloader"](0), len(jpegs))
    compiling_s = {}
    for mode in ("jpg", "raw"):
        began = time.process_time()
        loader = FFCVLoader(beton(folder / mode, pixels, mode), "base", BATCH, AUGMENT, 0, LoaderConfig(num_workers=1))
        show(loader.epoch(0), len(jpegs))
        compiling_s[mode] = time.process_time() - began
        sources[mode] = loader.epoch
    workers = [worker.pid for worker in getattr(baseline._iterator, "_workers", [])]
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for epoch in range(1, options.rounds + 1):
        for name, source in sources.items():
            cpu, wall = cpu_seconds(workers), time.perf_counter()
            show(source(epoch), len(jpegs))
            measured[name].append((cpu_seconds(workers) - cpu, time.perf_counter() - wall))
    return measured, compiling_s


def show(batches: Iterable[Any], count: int) -> None:
    """Take all images, and look that they are what was asked for."""
    taken, total = 0, 0.0
    for images, _ in batches:
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.dtype == torch.float32
        taken, total = taken + len(images), total + float(images[0].mean())
    assert taken == count
    assert abs(total / (taken / BATCH)) < 3


def cpu_seconds(workers: list[int]) -> float:
    """Of this process with all its threads, and of the given others."""
    ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in workers]
    return time.process_time() + sum(int(user) + int(system) for user, system in ticks) / os.sysconf("SC_CLK_TCK")


def beton(folder: Path, pixels: np.ndarray, mode: Any) -> Artifact:
    """The images as `prepare` leaves them."""
    partial = workspace(folder, "prepare", {}, {})
    images = ImageSet(pixels, np.zeros(len(pixels), np.int64), ("any",))
    write_beton(partial / beton_name("base"), images, BetonConfig(write_mode=mode, jpeg_quality=QUALITY), f"beton {mode}")
    return commit(partial, folder, "prepare", {}, {}, 0.0)


def natural(seed: int) -> bytes:
    """A JPEG with the statistics of photographs: amplitudes that fall with the frequency, colours that go together, some edges."""
    generator = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE), indexing="ij")
    spectrum = generator.normal(size=(4, SIZE, SIZE // 2 + 1, 2)) @ [1, 1j] / np.maximum(np.hypot(rows, columns), 1 / SIZE)
    grey, *colours = np.fft.irfft2(spectrum, (SIZE, SIZE))
    y, x = np.mgrid[:SIZE, :SIZE]
    angle, place = generator.uniform(0, 2 * np.pi, (3, 1, 1)), generator.uniform(SIZE / 4, SIZE * 3 / 4, (3, 2, 1, 1))
    edges = ((x - place[:, 0]) * np.cos(angle) + (y - place[:, 1]) * np.sin(angle) > 0).sum(0)
    image = np.stack([grey / grey.std() + 0.3 * colour / colour.std() + edges for colour in colours], axis=-1)
    return encoded(np.clip(127 + 45 * (image - image.mean()), 0, 255).astype(np.uint8))


def from_zip(path: Path, count: int) -> list[bytes]:
    """The first images of as many different folders as there are, at this size."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        chosen = names[:: max(1, len(names) // count)][:count]
        assert len(chosen) == count, f"{path} has only {len(names)} JPEG images"
        return [encoded(fit_to_square(Image.open(io.BytesIO(archive.read(name))), SIZE)) for name in chosen]


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(figure, 1) for name, figure in figures.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
