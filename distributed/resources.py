"""What is asked of Ray: its settings, and whether this machine can give it."""

import os
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field

from metadiff.config import config
from metadiff.errors import UserError


def an_address(address: str | None) -> str | None:
    """`address`, if it can be one.

    Raises:
        ValueError: it cannot.
    """
    host, _, port = (address or "").rpartition(":")
    if address in (None, "auto") or (host and "/" not in host and port.isdigit() and int(port) < 2**16):
        return address
    raise ValueError("expected nothing (an instance of its own), auto (the cluster this machine is a node of) or HOST:PORT")


def _one_or_two(workers: Any) -> Any:
    numbers: list[Any] = list(workers) if isinstance(workers, (list, tuple)) else [workers]
    if len(numbers) > 2 or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("expected a number, 0 for none of Ray's, or the fewest and the most, as in [1, 3]")
    if isinstance(workers, (list, tuple)) and not (len(numbers) == 2 and 0 < numbers[0] <= numbers[1]):
        raise ValueError("expected [fewest, most] with 1 <= fewest <= most, as in [1, 3]")
    return workers


def _a_share(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("above 1 a worker takes whole GPUs")
    return gpus


@config
class RayConfig:
    """Where the stages' processes run and what each of them gets; only the backbone depends on them, through batch norm."""

    address: Annotated[str | None, AfterValidator(an_address)] = None
    """A cluster's HOST:PORT or `auto`; without it, a private instance on this machine for as long as the command lasts."""
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_one_or_two)] = 1
    """Data-parallel processes of a training; 0: this process, without Ray. Two numbers, [fewest, most]: as many of them as the cluster's
    nodes have room for at any time (Ray counts what nodes have, also what others use of it, so this is for a cluster of one's own);
    pretraining, whose weights depend on the number, takes the fewest."""
    num_actors: Annotated[int, Field(ge=0)] = 1
    """Actors of the other stages; 0: this process, without Ray."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0), AfterValidator(_a_share)] = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a training is started again after it lost a worker."""

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most processes of a training."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def most(self) -> int:
        """The most processes that any stage asks for; 0: none needs Ray."""
        return max(*self.workers, self.num_actors)


def check_resources(settings: RayConfig, device: Literal["auto", "cpu", "cuda"] = "auto") -> None:
    """Refuse, before anything is started, what this machine cannot give. Of [fewest, most] workers the fewest have to fit.

    Args:
        device: `machine.device`.

    Raises:
        UserError: more CPUs or GPUs than there are, or GPUs that the configuration asks for and leaves unused.
    """
    if not settings.most:
        return
    if settings.gpus_per_worker and device == "cpu":
        raise UserError(
            f"ray.gpus_per_worker={settings.gpus_per_worker:g} with machine.device='cpu': set the one to 0 or the other to auto"
        )
    if not settings.gpus_per_worker and device == "cuda":
        raise UserError("machine.device='cuda' with ray.gpus_per_worker=0: Ray gives such workers no GPU; set ray.gpus_per_worker")
    if settings.address is None:
        _refuse_more("ray.num_workers", settings.workers, settings)
        _refuse_more("ray.num_actors", (settings.num_actors, settings.num_actors), settings)


def room(settings: RayConfig) -> dict[str, tuple[float, int]]:
    """Of each kind of resource, what one process takes and what this machine has."""
    return {
        "cpus": (settings.cpus_per_worker, len(os.sched_getaffinity(0))),
        "gpus": (settings.gpus_per_worker, torch.cuda.device_count()),
    }


def _refuse_more(knob: str, count: tuple[int, int], settings: RayConfig) -> None:
    fewest, most = count
    value, least = (f"{fewest}", "") if fewest == most else (f"{[fewest, most]}", " at least")
    for kind, (each, available) in room(settings).items():
        if fewest * each > available:
            raise UserError(
                f"{knob}={value}: with ray.{kind}_per_worker={each:g} it asks for {fewest * each:g} {kind[:-1].upper()}s{least}, "
                f"this machine has {available}; lower {knob} or ray.{kind}_per_worker, or give the ray.address of a cluster"
            )
