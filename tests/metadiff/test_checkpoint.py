import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from metadiff.checkpoint import Checkpoints, Superseded, load_state, save_state
from metadiff.errors import UserError
from metadiff.parallel import Ranks


def assert_same(first: Any, second: Any) -> None:
    """Equal in structure, types (a tuple comes back as a list), dtypes and bits."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert (first.dtype, first.shape) == (second.dtype, second.shape)
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert [(type(key), key) for key in first] == [(type(key), key) for key in second]
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert isinstance(second, list)
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert type(first) is type(second)
        assert first == second


def round_trip(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    save_state(path, state)
    return load_state(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


def refusal(path: Path) -> str:
    """The one line with which the checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        load_state(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_plain_values_and_keys_keep_their_types(path: Path) -> None:
    state = {1: "int key", "1": "str key", "flag": True, "count": 3, "rate": 0.1, "text": "\u00e9\n", "none": None}
    state |= {"betas": (0.9, 0.999), "empty": [{}, [], ()], "nested": {0: {1: [2, {"a": False}]}}, "dict": {"__tensor__": "x"}}
    assert_same(state, round_trip(path, state))
    assert round_trip(path, {"best": -math.inf})["best"] == -math.inf
    assert math.isnan(round_trip(path, {"best": math.nan})["best"])
    assert round_trip(path, {}) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3)])
def test_tensors_of_all_shapes_and_types(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    assert_same({"x": tensor, "list": [tensor + 1 if dtype != torch.bool else tensor]}, load_after(path, tensor, dtype))


def load_after(path: Path, tensor: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    return round_trip(path, {"x": tensor, "list": (tensor + 1 if dtype != torch.bool else tensor,)})


def test_tensors_that_share_memory(path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    parameter = nn.Parameter(whole.clone())
    state = {
        "whole": whole,
        "again": whole,
        "row": whole[1],
        "turned": whole.T,
        "strided": whole[:, ::2],
        "tied": [parameter, parameter.data],
    }
    assert_same(state, round_trip(path, state))


def test_channels_last_keeps_its_values(path: Path) -> None:
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert_same({"images": images}, round_trip(path, {"images": images}))


def test_what_is_loaded_is_ours_to_change(path: Path) -> None:
    original = torch.ones(3)
    first = round_trip(path, {"x": original})
    first["x"].add_(1)
    original.zero_()
    assert load_state(path)["x"].tolist() == [1, 1, 1]


def test_two_tensors_of_one_name_are_a_bug(path: Path) -> None:
    with pytest.raises(AssertionError, match=r"named a\.b"):
        save_state(path, {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)})
    assert not path.exists()


def test_other_tools_find_the_tensors_by_name(path: Path) -> None:
    save_state(path, {"net": {"weight": torch.ones(2)}, "steps": [torch.zeros(1)]})
    assert sorted(load_file(path)) == ["net.weight", "steps.0"]


OPTIMIZERS: list[Callable[[nn.Module], torch.optim.Optimizer]] = [
    lambda net: torch.optim.SGD(net.parameters(), 0.1, 0.9, nesterov=True),
    lambda net: torch.optim.Adam(net.parameters(), 0.1, fused=True),
    lambda net: torch.optim.AdamW([{"params": net[0].parameters(), "lr": 0.3}, {"params": net[1].parameters()}], 0.1, amsgrad=True),  # type: ignore[index]
]
SCHEDULERS: list[Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = [
    lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 4]),
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make_scheduler", SCHEDULERS)
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(path: Path, make_optimizer: Any, make_scheduler: Any) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        linear = nn.Linear(3, 4, bias=False)
        linear.weight.data = torch.arange(12.0).view(4, 3).sin()
        net = nn.Sequential(linear, nn.BatchNorm1d(4))
        optimizer = make_optimizer(net)
        return net, optimizer, make_scheduler(optimizer)

    def step(parts: Any, number: int) -> None:
        net, optimizer, scheduler = parts
        optimizer.zero_grad()
        net(torch.arange(15.0).view(5, 3).add(number).cos()).sin().mean().backward()
        optimizer.step()
        scheduler.step()

    straight = start()
    for number in range(6):
        step(straight, number)
    killed, resumed = start(), start()
    for number in range(3):
        step(killed, number)
    save_state(path, {"parts": [part.state_dict() for part in killed]})
    for part, state in zip(resumed, load_state(path)["parts"], strict=True):
        part.load_state_dict(state)
    for number in range(3, 6):
        step(resumed, number)
    assert_same(straight[0].state_dict(), dict(resumed[0].state_dict()))
    assert straight[2].get_last_lr() == resumed[2].get_last_lr()
    assert_same(straight[1].state_dict()["state"], resumed[1].state_dict()["state"])


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -4, -1])
def test_truncated_checkpoint_is_refused(path: Path, keep: int) -> None:
    save_state(path, {"x": torch.arange(10.0), "step": 3})
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated or damaged" in refusal(path)


def test_what_is_no_checkpoint_is_refused(path: Path) -> None:
    assert "no such file" in refusal(path)
    save_file({"x": torch.ones(1)}, path)
    assert "truncated or damaged" in refusal(path)
    save_file({"x": torch.ones(1)}, path, {"state": "[[]"})
    assert "truncated or damaged" in refusal(path)
    save_file({"x": torch.ones(1)}, path, {"state": '{"__tensor__": "y"}'})
    assert "truncated or damaged" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "truncated or damaged" in refusal(path)


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "write", [lambda trap, path: path.write_bytes(pickle.dumps(trap)), lambda trap, path: torch.save({"x": trap}, path)]
)
def test_a_pickle_in_its_place_is_refused_without_being_executed(path: Path, write: Callable[[Trap, Path], object]) -> None:
    made = path.with_name("made")
    write(Trap(made), path)
    assert "truncated or damaged" in refusal(path)
    assert not made.exists()
    pickle.loads(pickle.dumps(Trap(made)))
    assert made.exists()


def test_a_kill_while_saving_leaves_the_old_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(path, {"epoch": 1})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
            patch.setattr(os, step, die)
            save_state(path, {"epoch": 2})
        assert load_state(path) == {"epoch": 1}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    """A training's at steps 10, 20 and 30."""
    begun = Checkpoints(tmp_path, "net")
    assert begun.resume() == (0, {})
    for step in (10, 20, 30):
        begun.save(step, state_at(step))
    return begun


def state_at(step: int) -> dict[str, Any]:
    return {"weights": torch.full((3,), float(step))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kept(*steps: int) -> list[str]:
    return sorted(["net.attempt", *(f"net-{step}.{kind}" for step in steps for kind in ("safetensors", "json"))])


def test_the_newest_two_are_kept_and_the_newest_is_resumed_from(
    checkpoints: Checkpoints, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert names(tmp_path) == kept(20, 30)
    assert_same((30, state_at(30)), list(Checkpoints(tmp_path, "net").resume()))
    assert capfd.readouterr().err == ""


def test_plain_values_beside_the_state_come_back_with_it(tmp_path: Path, checkpoints: Checkpoints) -> None:
    checkpoints.beside["losses"] = 0.1 + 0.2
    checkpoints.save(40, state_at(40))
    checkpoints.beside["losses"] = 7.0
    again = Checkpoints(tmp_path, "net")
    again.beside["losses"] = 9.0
    assert_same((40, state_at(40)), list(again.resume()))
    assert again.beside == {"losses": 0.1 + 0.2}
    cut(tmp_path / "net-40.safetensors")
    again.resume()
    assert again.beside == {}, "of the one that it goes on from"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_bytes(b"\xff")


def other_step(path: Path) -> None:
    path.write_text(path.read_text().replace("30", "31", 1))


DAMAGES = [
    *[(damage, "safetensors") for damage in (cut, flip, garble, Path.unlink)],
    *[(damage, "json") for damage in (cut, garble, other_step, Path.unlink)],
]


@pytest.mark.parametrize(("damage", "kind"), DAMAGES)
def test_what_does_not_hold_is_passed_over_in_one_line(
    checkpoints: Checkpoints, tmp_path: Path, capfd: pytest.CaptureFixture, damage: Callable[[Path], object], kind: str
) -> None:
    damage(tmp_path / f"net-30.{kind}")
    again = Checkpoints(tmp_path, "net")
    assert_same((20, state_at(20)), list(again.resume()))
    (line,) = capfd.readouterr().err.splitlines()
    assert "net-30.safetensors: unfinished or damaged; goes on from step 20" in line
    again.save(30, state_at(30))
    assert names(tmp_path) == kept(20, 30)
    assert Checkpoints(tmp_path, "net").resume()[0] == 30


def test_where_none_holds_the_training_starts_afresh(checkpoints: Checkpoints, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    for step in (20, 30):
        cut(tmp_path / f"net-{step}.safetensors")
    again = Checkpoints(tmp_path, "net")
    assert again.resume() == (0, {})
    assert capfd.readouterr().err.count("starts afresh") == 1
    again.save(10, state_at(10))
    assert names(tmp_path) == kept(10), "the damaged ones are not kept in its place"
    assert Checkpoints(tmp_path, "net").resume()[0] == 10


def test_a_kill_while_saving_counts_for_nothing(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(path: Path, content: bytes) -> None:
        path.write_bytes(content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr("metadiff.checkpoint.write_atomically", die)
        checkpoints.save(40, state_at(40))
    assert Checkpoints(tmp_path, "net").resume()[0] == 30


def test_trainings_side_by_side_leave_each_other_alone(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for name in ("other.net", "net-1", "net.2"):
        beside = Checkpoints(tmp_path, name)
        assert beside.resume()[0] == 0
        beside.save(50, state_at(50))
        beside.clear()
    assert names(tmp_path) == kept(20, 30)


def test_nothing_is_left_of_a_finished_training(checkpoints: Checkpoints, tmp_path: Path) -> None:
    flip(tmp_path / "net-30.json")
    checkpoints.clear()
    assert names(tmp_path) == []
    checkpoints.clear()


def test_an_older_attempt_writes_no_more(checkpoints: Checkpoints, tmp_path: Path) -> None:
    newer = Checkpoints(tmp_path, "net")
    newer.resume()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(Superseded, match="gives way to a newer one"):
        checkpoints.save(40, state_at(40))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    newer.save(40, state_at(40))
    newer.clear()
    with pytest.raises(Superseded, match="one that has finished"):
        checkpoints.writable()


def test_the_other_ranks_write_nothing(checkpoints: Checkpoints, tmp_path: Path) -> None:
    other = Checkpoints(tmp_path, "net", Ranks(1, 2))
    assert not other.writable()
    other.save(40, state_at(40))
    assert names(tmp_path) == kept(20, 30)
