"""Trainings in Ray Train's workers: as in one process, whatever dies."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist

from distributed.attempts import Attempt, begin
from distributed.resources import RayConfig
from distributed.runtime import connect, session
from distributed.workers import _rank, launch
from metadiff.denoiser import DenoiserConfig, build_denoiser
from metadiff.errors import UserError
from metadiff.learners import PrototypeLearner, Support
from metadiff.optimisation import TrainConfig
from metadiff.parallel import Ranks
from metadiff.schedule import Schedule
from metadiff.training import train
from tests.tasks import DIM, batches

ROOT = Path(__file__).parents[2]
SETTINGS = TrainConfig(iterations=160, batch_size=8, ema_decay=0.9, ema_start=20, checkpoint_every=50)
RAY = RayConfig(num_workers=2, num_actors=0)


def loop(ranks: Ranks, folder: Path, dies_at: int | None = None, storage: Path | None = None, error: str = "", size: int = 8) -> None:
    """Train a denoiser; with the last rank killed at an iteration with Ray's storage in ruins, or with an error at the end."""

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        for iteration, batch in enumerate(batches(ranks, size, start), start):
            if iteration == dies_at and ranks.rank == ranks.world - 1 and not (folder / "died").exists():
                (folder / "died").write_text(f"{start}")
                ruin(storage)
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    schedule = Schedule()
    denoiser = build_denoiser(DenoiserConfig(), DIM, PrototypeLearner(), schedule)
    train(denoiser, schedule, source, replace(SETTINGS, batch_size=size), 0, folder / "d", "train", ranks=ranks)
    if error:
        raise UserError(error)


def ruin(storage: Path | None) -> None:
    """Damage all that Ray keeps, and add a snapshot that is none."""
    for run in storage.glob("*/ray/train") if storage else ():
        shutil.rmtree(run)
        run.mkdir()
        (run / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [')


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training in this process leaves."""
    folder = tmp_path_factory.mktemp("alone")
    launch(loop, {"folder": folder}, RayConfig(num_workers=0), folder / "ray")
    assert sorted(path.name for path in folder.iterdir()) == ["d.jsonl", "d.safetensors"]
    return folder


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """An instance with room for two workers."""
    with session():
        connect(RAY)
        yield


def one_rank(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=60), 2, rank)
    loop(Ranks(rank, 2), folder)
    dist.destroy_process_group()


def two_ranks_without_ray(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("spawn").Process(target=one_rank, args=(rank, folder, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_one_worker_equals_none_to_the_bit(alone: Path, tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="what a rank has against the input"):
        launch(
            loop,
            {"folder": tmp_path, "error": "what a rank has against the input"},
            RayConfig(num_workers=1, num_actors=0),
            tmp_path / "ray",
        )
    for name in ("d.safetensors", "d.jsonl"):
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()
    shown = capfd.readouterr().err
    assert "starting 1 worker" in shown
    assert "160/160" in shown, "the progress bar of the rank"
    assert not (tmp_path / "ray").exists()


def test_as_many_workers_as_there_is_room_for(alone: Path, tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture) -> None:
    """Two of at most three, with unequal shares of a batch of 7."""
    elastic = replace(RAY, num_workers=(1, 3))
    for name, settings in (("one", replace(RAY, num_workers=0)), ("two", elastic)):
        (tmp_path / name).mkdir()
        launch(loop, {"folder": tmp_path / name, "size": 7}, settings, tmp_path / "ray", elastic=settings is elastic)
    shown = capfd.readouterr().err
    assert "ray: starting 1 to 3 workers, as there is room\n" in shown
    assert "ray: 2 workers now" in shown
    one, two = (load_file(tmp_path / name / "d.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    assert any(not torch.equal(one[name], two[name]) for name in one), "sums of two ranks are rounded otherwise"


def test_a_killed_rank_changes_nothing(alone: Path, tmp_path: Path, ray_session: None) -> None:
    """Killed drivers: tests/chaos."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    launch(loop, {"folder": cut, "dies_at": 120, "storage": cut / "ray"}, RAY, cut / "ray")
    assert (cut / "died").exists()
    two_ranks_without_ray(whole)
    for name in ("d.safetensors", "d.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == ["d.jsonl", "d.safetensors", "died"]
    one, two = load_file(alone / "d.safetensors"), load_file(cut / "d.safetensors")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_ranks_of_a_superseded_attempt_end_at_once(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path / "old")
    _rank(pytest.fail, {"reason": "it ran"}, RAY, attempt)
    attempt.folder.mkdir()
    attempt.said.touch()
    assert attempt.wanted
    attempt.fail(UserError("no"))
    _rank(pytest.fail, {"reason": "it ran"}, RAY, attempt)


@pytest.mark.parametrize("error", [UserError("bad: value; mend it"), OSError(28, "No space left on device", "/x/y"), OSError(13, "no")])
def test_errors_for_the_user_cross_from_rank_to_driver(error: UserError | OSError, tmp_path: Path) -> None:
    attempt = Attempt(tmp_path)
    assert attempt.failure is None
    attempt.fail(error)
    told = attempt.failure
    assert type(told) is type(error)
    assert str(told) == str(error)
    if isinstance(error, OSError):
        assert isinstance(told, OSError)
        assert (told.errno, told.filename) == (error.errno, error.filename)


def test_what_a_killed_attempt_claimed_of_the_cluster_is_given_up(tmp_path: Path, ray_session: None) -> None:
    """Ray would keep the room of a training whose driver was killed for minutes, even from the next attempt at it."""
    import ray
    from ray.train import ScalingConfig
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as coordinator

    coordinator.TrainAutoscalingCoordinatorClient("train-old").send_resource_request(ScalingConfig(num_workers=2), 2)
    coordinator.TrainAutoscalingCoordinatorClient("train-new").send_resource_request(ScalingConfig(num_workers=2), 2)

    def room(name: str) -> dict:
        actor: Any = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        return ray.get(actor.get_reserved_resources.remote(name))

    assert (bool(room("train-old")), bool(room("train-new"))) == (True, False)
    killed = Attempt(tmp_path / "ray" / "old")
    killed.folder.mkdir(parents=True)
    killed.claim("old")
    with begin(tmp_path / "ray") as attempt:
        assert (bool(room("train-old")), bool(room("train-new"))) == (False, True)
        attempt.claim("new")
    assert not room("train-new")


def test_a_claim_that_nobody_can_answer_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "ray" / "old").mkdir(parents=True)
    Attempt(tmp_path / "ray" / "old").claim("old")
    with begin(tmp_path / "ray"):
        assert not (tmp_path / "ray" / "old").exists()


def test_without_workers_ray_is_not_even_imported(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from distributed.resources import RayConfig; from distributed.workers import launch\n"
        "launch(print, {}, RayConfig(num_workers=0), Path('nowhere')); assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Ranks(rank=0, world=1" in done.stdout
