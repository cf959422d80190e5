from collections.abc import Iterator

import pytest
import torch

from metadiff.config import validate
from metadiff.errors import UserError
from metadiff.machine import MachineConfig, set_up


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_set_and_zero_leaves_them_alone() -> None:
    set_up(MachineConfig(num_threads=2))
    assert torch.get_num_threads() == 2
    set_up(MachineConfig())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("wanted", "available", "device"), [("auto", False, "cpu"), ("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu")]
)
def test_device(monkeypatch: pytest.MonkeyPatch, wanted: str, available: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert set_up(validate(MachineConfig, {"device": wanted}, "c.yaml")) == torch.device(device)


def test_cuda_that_is_not_there_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"machine.device='cuda': torch finds no CUDA device; use machine.device=cpu"):
        set_up(MachineConfig(device="cuda"))


def test_other_devices_are_refused() -> None:
    with pytest.raises(UserError, match="device='tpu': Input should be 'auto', 'cpu' or 'cuda'"):
        validate(MachineConfig, {"device": "tpu"}, "c.yaml")
