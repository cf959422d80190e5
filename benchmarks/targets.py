"""How fast targets are fitted: the class-grouped solver beside a loop over tasks of torch's L-BFGS, and scikit-learn.

    python -m benchmarks.targets [--bank RUN/embed] [--tasks 1000] [--rounds 5] [--threads 2] [--device cpu]

A linear learner, lambda 1e-3, until no element of the gradient exceeds 1e-4, on an imitation of mini-ImageNet features (see
`benchmarks.imitation`) and, where there is one, on a real bank. Each round measures all of them in turn, and the machine's best product of
two 2048 x 2048 matrices; the figures are medians over rounds. Then the engine: actors of one thread on blocks of 1,000 tasks. The last line
is one JSON object: the figures of the imitation, and below `bank` those of the real one.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from benchmarks.imitation import imitation
from distributed.runtime import RayConfig, connect, session, work_through
from distributed.store import TargetStore
from metadiff import artifact
from metadiff.episodes import EpisodeSampler
from metadiff.features import FeatureBank, FeaturesConfig, FeatureTransform
from metadiff.learners import LinearLearner
from metadiff.machine import MachineConfig, set_up
from metadiff.targets import DIAGNOSTICS, TargetsConfig, TargetSolver

LEARNER, WAY, BLOCK = LinearLearner(l2=1e-3), 5, 1000
LIMITS = {"ratio_vs_task_loop": 20, "ratio_vs_sklearn": 40, "actors_2_over_1": 1.7}
LOOP_TASKS, SKLEARN_TASKS, PARITY_TASKS, ENGINE_BLOCKS = 8, 4, 20, 5


class Features(NamedTuple):
    """x (n, D) sorted by class, and where each class begins."""

    x: Tensor
    offsets: np.ndarray

    def classes(self, tasks: range) -> np.ndarray:
        return EpisodeSampler(self.offsets, WAY, 1, 1, 0).classes(np.array(tasks))

    def of_task(self, classes: np.ndarray) -> tuple[Tensor, Tensor]:
        """All images of a task's classes, and their labels."""
        spans = [slice(*self.offsets[label : label + 2].tolist()) for label in classes]
        labels = torch.arange(WAY, device=self.x.device).repeat_interleave(
            torch.tensor([s.stop - s.start for s in spans]).to(self.x.device)
        )
        return torch.cat([self.x[span] for span in spans]), labels


def settings(**changes: Any) -> TargetsConfig:
    return TargetsConfig(**{"kind": "ce", "tolerance": 1e-4, "num_tasks": BLOCK, **changes})


def main(arguments: list[str]) -> int:
    """Measure, and print the figures; 1 if one is beyond its limit."""
    options = parsed(arguments)
    set_up(MachineConfig(num_threads=options.threads))
    sets = {"imitation": Features(*imitation())} | ({"bank": opened(options.bank)} if options.bank else {})
    result: dict[str, dict[str, Any]] = {}
    for name, features in sets.items():
        print(f"{name}: {tuple(features.x.shape)}, {len(features.offsets) - 1} classes", flush=True)
        result[name] = alone(Features(features.x.to(options.device), features.offsets), options)
        if options.device == "cpu":
            result[name] |= on_the_engine(features, options)
        print(json.dumps({name: result[name]}), flush=True)
    about = {"device": options.device, "threads": options.threads, "tasks": options.tasks, "rounds": options.rounds}
    print(json.dumps(result.pop("imitation") | result | about))
    return 0 if all(result.get("imitation", result).get(key, limit) >= limit for key, limit in LIMITS.items()) else 1


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets")
    parser.add_argument("--bank", type=Path, help="the `embed` artifact of a finished run, such as runs/mini_imagenet_conv4/embed")
    parser.add_argument("--tasks", type=int, default=BLOCK)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args(arguments)


def opened(bank: Path) -> Features:
    """A bank's base classes, of standard deviation 1."""
    features = FeatureBank.open(artifact.read(bank), "base")
    return Features(FeatureTransform.fit(features.features, FeaturesConfig(std=1.0))(features.features), features.offsets)


def alone(features: Features, options: argparse.Namespace) -> dict[str, Any]:
    """The solver beside the others, in this process."""
    began = time.perf_counter()
    solver = TargetSolver(features.x, features.offsets, LEARNER, settings())
    setup_s = time.perf_counter() - began
    classes, iterations, evaluations = features.classes(range(options.tasks)), 0.0, []
    seconds: dict[str, list[float]] = {"solver": [], "loop": [], "sklearn": [], "peak": []}
    for turn in range(options.rounds):
        fitted, took = timed(lambda: solver.fit(classes), features.x.device)
        assert float(fitted.gradient_norm.max()) <= 1e-4
        iterations = float(fitted.iterations.double().mean())
        seconds["solver"].append(took / options.tasks)
        for task in range(turn * LOOP_TASKS, (turn + 1) * LOOP_TASKS):
            (_, calls), took = timed(lambda task=task: looped(*features.of_task(classes[task % len(classes)])), features.x.device)
            seconds["loop"].append(took)
            evaluations.append(calls)
        for task in range(turn * SKLEARN_TASKS, (turn + 1) * SKLEARN_TASKS):
            x, y = (part.cpu() for part in features.of_task(classes[task % len(classes)]))
            seconds["sklearn"].append(timed(lambda x=x, y=y: regressed(x, y, 1e-4), x.device)[1])
        seconds["peak"].append(product_seconds(features.x.device))
    each = {name: statistics.median(values) for name, values in seconds.items()}
    images = float(np.diff(features.offsets).mean()) * WAY
    useful = 4 * images * features.x.shape[1] * WAY * iterations
    peak = 2 * 2048**3 / min(seconds["peak"])
    return {
        "ratio_vs_task_loop": round(each["loop"] / each["solver"], 1),
        "ratio_vs_sklearn": round(each["sklearn"] / each["solver"], 1),
        "share_of_gemm_peak": round(useful / each["solver"] / peak, 3),
        "iterations": round(iterations, 1),
        "loop_evaluations": round(statistics.mean(evaluations), 1),
        "ms_per_task": {name: round(each[name] * 1e3, 3) for name in ("solver", "loop", "sklearn")},
        "gemm_peak_gflops": round(peak / 1e9),
        "setup_s": round(setup_s, 2),
        "parity": parity(features),
    }


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def product_seconds(device: torch.device) -> float:
    """The fastest of some products of 2048 x 2048 matrices."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    return min(timed(lambda: a @ b, device)[1] for _ in range(5))


def objective(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.T, y) + LEARNER.l2 / 2 * w.square().sum()


def looped(x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """One task by torch's L-BFGS, and its evaluations."""
    w, calls = x.new_zeros(WAY, x.shape[1]).requires_grad_(), 0
    descent = torch.optim.LBFGS(
        [w], max_iter=5000, max_eval=10_000, history_size=10, tolerance_grad=1e-4, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def evaluate() -> Tensor:
        nonlocal calls
        calls += 1
        w.grad = None
        loss = objective(w, x, y)
        loss.backward()
        return loss

    descent.step(evaluate)  # pyright: ignore[reportArgumentType]
    return w.detach(), calls


def regressed(x: Tensor, y: Tensor, tolerance: float) -> Tensor:
    """One task by scikit-learn, in the type of x."""
    model = LogisticRegression(C=1 / (len(x) * LEARNER.l2), fit_intercept=False, tol=tolerance, max_iter=100_000)
    return torch.from_numpy(model.fit(x.numpy(), y.numpy()).coef_)


def parity(features: Features) -> float:
    """How far above scikit-learn's least objective, in float64, the solver's is at tolerance 1e-6: the largest relative difference."""
    classes = features.classes(range(PARITY_TASKS))
    fitted = TargetSolver(features.x, features.offsets, LEARNER, settings(tolerance=1e-6, max_iterations=5000)).fit(classes)
    worst = 0.0
    for w, labels in zip(fitted.w.cpu().double(), classes, strict=True):
        x, y = (part.cpu() for part in features.of_task(labels))
        least = float(objective(regressed(x.double(), y, 1e-9), x.double(), y))
        worst = max(worst, abs(float(objective(w, x.double(), y)) - least) / least)
    return float(f"{worst:.1e}")


class TimedWorker:
    """An actor that fits blocks into a store, and says what it spent on fitting and how large it is."""

    def __init__(self, folder: Path, store: TargetStore) -> None:
        self._features = Features(torch.from_numpy(np.load(folder / "x.npy")), np.load(folder / "offsets.npy"))
        self._solver, self._store = TargetSolver(*self._features, LEARNER, settings()), store

    def run(self, block: int) -> tuple[float, float]:
        tasks = range(block * BLOCK, (block + 1) * BLOCK)
        classes = self._features.classes(tasks)
        fitted, took = timed(lambda: self._solver.fit(classes), torch.device("cpu"))
        tensors = {name: getattr(fitted, name) for name, _ in DIAGNOSTICS}
        self._store.commit(block, {"classes": torch.from_numpy(classes), "targets": fitted.w, **tensors}, tasks.start, tasks.stop - 1)
        return took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def on_the_engine(features: Features, options: argparse.Namespace) -> dict[str, Any]:
    """Two actors of one thread beside one, and what all but the fitting costs."""
    speeds: dict[int, list[float]] = {1: [], 2: []}
    overheads, sizes = [], []
    with tempfile.TemporaryDirectory() as name, session():
        connect(RayConfig(num_actors=2))
        folder = Path(name)
        np.save(folder / "x.npy", features.x.numpy())
        np.save(folder / "offsets.npy", features.offsets)
        for turn in range(max(1, options.rounds // 2)):
            for actors in (1, 2):
                store = TargetStore.open(folder / f"{turn}.{actors}", {"round": turn, "actors": actors, "config": {}})
                speed, overhead, size = run_of(folder, store, actors)
                speeds[actors].append(speed)
                overheads += [overhead] * (actors == 1)
                sizes.append(size)
    return {
        "actors_2_over_1": round(statistics.median(two / one for one, two in zip(speeds[1], speeds[2], strict=True)), 2),
        "engine_overhead": round(statistics.median(overheads), 3),
        "peak_memory_gb": round(max(sizes), 2),
        "tasks_per_s_of_an_actor": round(statistics.median(speeds[1])),
    }


def run_of(folder: Path, store: TargetStore, actors: int) -> tuple[float, float, float]:
    """Tasks a second from the first block on, the share of time beside the fitting, and an actor's largest size in GB."""
    blocks = list(range(ENGINE_BLOCKS * actors + actors))
    ends, fits, sizes = [], [], []
    for _, (took, size) in work_through(TimedWorker, (folder, store), blocks, RayConfig(num_actors=actors)):
        ends.append(time.perf_counter())
        fits.append(took)
        sizes.append(size)
    # The first of each actor includes its start.
    lasted, fitting = ends[-1] - ends[actors - 1], sum(fits[actors:])
    return (len(ends) - actors) * BLOCK / lasted, actors * lasted / fitting - 1, max(sizes)


if __name__ == "__main__":
    # Under its own name, by which the actors import it as well.
    from benchmarks import targets

    sys.exit(targets.main(sys.argv[1:]))
