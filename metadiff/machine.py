"""The machine a command runs on: its device, its threads, its memory allocator."""

import ctypes
import platform
from typing import Annotated, Literal

import torch
from pydantic import Field

from metadiff.config import config
from metadiff.errors import UserError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


@config
class MachineConfig:
    """Where to compute; nothing here changes what an artifact is identified by."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0 leaves torch's own choice."""


def set_up(machine: MachineConfig) -> torch.device:
    """Apply the settings to this process and return the device.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if machine.num_threads:
        torch.set_num_threads(machine.num_threads)
    _keep_freed_memory()
    available = torch.cuda.is_available()
    if machine.device == "cuda" and not available:
        raise UserError("machine.device='cuda': torch finds no CUDA device; use machine.device=cpu, or auto to take what there is")
    return torch.device("cuda" if available and machine.device != "cpu" else "cpu")


def return_freed_memory() -> None:
    """Give the kernel back what `set_up` has glibc keep: after work whose arrays differ in size, which leaves holes between them."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Let glibc reuse freed blocks rather than return them to the kernel.

    Activations of tens of megabytes are otherwise mapped and zeroed anew in every step, which halves CPU training speed.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**28)
