"""The training loop: it learns, averages, resumes to the bit, and keeps to the golden losses."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, pairwise, repeat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metadiff import training
from metadiff.checkpoint import Superseded, load_state
from metadiff.denoiser import Denoiser, DenoiserConfig, build_denoiser
from metadiff.errors import UserError
from metadiff.learners import PrototypeLearner, Support
from metadiff.metrics import read_rows
from metadiff.optimisation import Optimisation, TrainConfig
from metadiff.parallel import Ranks
from metadiff.schedule import Schedule
from metadiff.training import _Notice, load_denoiser, train

WAY, SHOT, DIM = 3, 2, 16
SCHEDULE = Schedule()
SHORT = TrainConfig(iterations=150, batch_size=8, learning_rate=1e-3, ema_decay=0.9, ema_start=20, checkpoint_every=50)


def batches(start: int) -> Iterator[tuple[Tensor, Support]]:
    """Targets scattered like small features, and supports scattered around them; a pure function of the iteration."""
    for iteration in count(start):
        generator = torch.Generator().manual_seed(iteration)
        w_0 = 0.1 * torch.randn(SHORT.batch_size, WAY, DIM, generator=generator)
        noise = 0.05 * torch.randn(SHORT.batch_size, WAY * SHOT, DIM, generator=generator)
        labels = torch.arange(WAY).repeat_interleave(SHOT).expand(SHORT.batch_size, -1)
        yield w_0, Support(w_0.repeat_interleave(SHOT, 1) + noise, labels, WAY)


def new_denoiser(preset: str = "stable", seed: int = 0) -> Denoiser:
    return build_denoiser(DenoiserConfig(preset=preset), DIM, PrototypeLearner(), SCHEDULE, seed=seed)  # type: ignore[arg-type]


def run(folder: Path, settings: TrainConfig = SHORT, source: training.BatchSource = batches, denoiser: Denoiser | None = None) -> Path:
    train(denoiser or new_denoiser(), SCHEDULE, source, settings, 0, folder / "d", "train")
    return folder / "d.safetensors"


def test_loss_falls(tmp_path: Path) -> None:
    same = next(batches(0))
    settings = TrainConfig(iterations=300, batch_size=8, learning_rate=1e-2)
    run(tmp_path, settings, lambda start: repeat(same), new_denoiser("paper"))
    rows = read_rows(tmp_path / "d.jsonl")
    assert [row["iteration"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


def test_average_moves_and_is_what_samples(tmp_path: Path) -> None:
    denoiser = new_denoiser()
    averaged = load_state(run(tmp_path, denoiser=denoiser))["denoiser"]
    start, end = new_denoiser().state_dict(), denoiser.state_dict()
    for name, average in averaged.items():
        assert not torch.equal(average, start[name]), f"{name} never moved"
        assert not torch.equal(average, end[name]), f"{name} is no average"
    (tmp_path / "plain").mkdir()
    plain = TrainConfig(iterations=150, batch_size=8, learning_rate=1e-3)
    again = new_denoiser()
    weights = load_state(run(tmp_path / "plain", plain, denoiser=again))["denoiser"]
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())


def test_average_of_the_official_preset_starts_late(tmp_path: Path) -> None:
    late = TrainConfig(iterations=100, batch_size=8, ema_decay=0.9999, ema_start=99)
    denoiser = new_denoiser("official")
    averaged = load_state(run(tmp_path, late, denoiser=denoiser))["denoiser"]
    assert all(torch.equal(averaged[name], value) for name, value in denoiser.state_dict().items()), "its first update copies the weights"


@pytest.mark.parametrize("stopped_at", [30, 70, 100, 149])
def test_resume_equals_uninterrupted_bit_for_bit(stopped_at: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = run(tmp_path / "whole")

    def killed(start: int) -> Iterator[tuple[Tensor, Support]]:
        yield from islice(batches(start), stopped_at)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", source=killed)
    assert not (tmp_path / "cut" / "d.safetensors").exists()
    cut = run(tmp_path / "cut", denoiser=new_denoiser(seed=1) if stopped_at >= 50 else new_denoiser())
    assert cut.read_bytes() == whole.read_bytes()
    assert read_rows(tmp_path / "cut" / "d.jsonl") == read_rows(tmp_path / "whole" / "d.jsonl")
    assert [path.name for path in sorted((tmp_path / "cut").iterdir())] == ["d.jsonl", "d.safetensors"]


def test_a_notice_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, seen = run(tmp_path / "whole"), []

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        for batch in batches(start):
            seen.append(start + len(seen))
            if len(seen) == 46:
                raise KeyboardInterrupt
            yield batch

    told = Ranks(notice=lambda: len(seen) >= 20)
    with pytest.raises(KeyboardInterrupt):
        train(new_denoiser(), SCHEDULE, source, SHORT, 0, tmp_path / "cut" / "d", "train", ranks=told)
    (left,) = (tmp_path / "cut").glob("d.checkpoint-*.json")
    step = int(left.stem.rpartition("-")[2])
    assert 20 <= step <= 45

    starts: list[int] = []
    cut = run(tmp_path / "cut", source=lambda start: starts.append(start) or batches(start), denoiser=new_denoiser(seed=1))
    assert starts == [step]
    assert cut.read_bytes() == whole.read_bytes()
    assert (tmp_path / "cut" / "d.jsonl").read_bytes() == (tmp_path / "whole" / "d.jsonl").read_bytes(), "also of the half window"


@pytest.mark.parametrize("seconds", [0.001, 0.3, 5.0])
def test_a_notice_is_asked_for_about_once_a_second(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked, noticed = [0.0], [], []
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    notice = _Notice(Ranks(notice=lambda: asked.append(clock[0]) or clock[0] > 60), 0)
    for done in range(1, int(80 / seconds)):
        clock[0] += seconds
        if notice.heeded(done):
            noticed.append(clock[0])
    pauses = [later - earlier for earlier, later in pairwise(asked)][12:]
    assert pauses == pytest.approx([max(1.0, seconds)] * len(pauses), abs=1.1 * seconds)
    assert noticed[0] == pytest.approx(60, abs=max(1.0, seconds) + seconds)
    assert {asked.index(later) - asked.index(earlier) for earlier, later in pairwise(noticed)} <= {5}, "not at every answer"
    assert len(noticed) > 1 or seconds > 1


@pytest.mark.parametrize(("damaged", "resumed_at"), [((150,), 100), ((150, 100), 0)])
def test_damaged_checkpoints_change_nothing_but_the_time(damaged: tuple[int, ...], resumed_at: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    settings = replace(SHORT, iterations=170)
    whole, starts = run(tmp_path / "whole", settings), []

    def source(start: int) -> Iterator[tuple[Tensor, Support]]:
        starts.append(start)
        yield from islice(batches(start), 160 if len(starts) == 1 else None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", settings, source)
    for step in damaged:
        path = tmp_path / "cut" / f"d.checkpoint-{step}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    cut = run(tmp_path / "cut", settings, source, new_denoiser(seed=1 if resumed_at else 0))
    assert starts == [0, resumed_at]
    assert cut.read_bytes() == whole.read_bytes()
    assert (tmp_path / "cut" / "d.jsonl").read_bytes() == (tmp_path / "whole" / "d.jsonl").read_bytes()
    assert [path.name for path in sorted((tmp_path / "cut").iterdir())] == ["d.jsonl", "d.safetensors"]


def test_an_attempt_that_a_newer_one_overtakes_stops_and_leaves_its_files_alone(tmp_path: Path) -> None:
    """As when Ray's processes outlive their killed driver, and the same command is started again."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "both").mkdir()
    whole = run(tmp_path / "whole")
    seen = []

    def overtaken(start: int) -> Iterator[tuple[Tensor, Support]]:
        yield from islice(batches(start), 70)
        both = run(tmp_path / "both", denoiser=new_denoiser(seed=1))
        seen.extend((path, path.read_bytes()) for path in sorted(both.parent.iterdir()))
        yield from batches(70)

    with pytest.raises(Superseded):
        run(tmp_path / "both", source=overtaken)
    assert seen == [(path, path.read_bytes()) for path in sorted((tmp_path / "both").iterdir())]
    assert (tmp_path / "both" / "d.safetensors").read_bytes() == whole.read_bytes(), "it had resumed from the older one's checkpoint"


def test_each_row_is_logged_once_it_is_written(tmp_path: Path) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    train(new_denoiser(), SCHEDULE, batches, SHORT, 0, tmp_path / "d", "train", log=lambda done, row: logged.append((done, row)))
    assert logged == list(zip([50, 100, 150], read_rows(tmp_path / "d.jsonl"), strict=True))


def test_a_batch_that_cannot_be_shared_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch_size=8: cannot be shared equally by 3 workers; .*multiple of 3.*ray.num_workers"):
        train(new_denoiser(), SCHEDULE, batches, SHORT, 0, tmp_path / "d", "train", ranks=Ranks(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_golden_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    run(tmp_path, TrainConfig(iterations=20, batch_size=8, learning_rate=1e-3))
    losses = [row["loss"] for row in read_rows(tmp_path / "d.jsonl")]
    # Single precision on other processors differs in the last bits; a change of the method differs in the first digits.
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


def test_raw_gradient_needs_no_training(tmp_path: Path) -> None:
    bare = build_denoiser(DenoiserConfig(body="none"), DIM, PrototypeLearner(), SCHEDULE)
    load_denoiser(run(tmp_path, denoiser=bare), bare)


def test_diverged_loss_is_an_error(tmp_path: Path) -> None:
    def broken(start: int) -> Iterator[tuple[Tensor, Support]]:
        for w_0, support in batches(start):
            yield w_0 * math.nan, support

    with pytest.raises(UserError, match="loss is nan at iteration 50"):
        run(tmp_path, source=broken)


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    path = run(tmp_path)
    other = build_denoiser(DenoiserConfig(), 2 * DIM, PrototypeLearner(), SCHEDULE)
    with pytest.raises(UserError, match="does not fit"):
        load_denoiser(path, other)


@pytest.mark.parametrize(("decay", "last"), [("constant", 1.0), ("cosine", 0.0)])
def test_rate(decay: str, last: float) -> None:
    settings = TrainConfig(iterations=100, warmup=10, decay=decay)  # type: ignore[arg-type]
    state = Optimisation(new_denoiser(), Schedule(), settings, 0)
    assert state._rate(0) == pytest.approx(0.1)
    assert state._rate(9) == pytest.approx(1.0, abs=0.03)
    assert state._rate(100) == pytest.approx(last, abs=1e-6)


GOLDEN = [
    0.07161396,
    0.1357116,
    0.1325942,
    0.07902556,
    0.07291389,
    0.332973,
    0.02464412,
    0.2235314,
    0.01380066,
    0.1978986,
    0.131853,
    0.3467558,
    0.03407343,
    0.09197161,
    0.1286647,
    0.1174929,
    0.02806227,
    0.03160767,
    0.09880722,
    0.2356238,
]
