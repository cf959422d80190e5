"""What a simulated fit of targets runs on: the work, the machines, the store, with what chance does to them."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field

from metadiff.config import config

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


@config
class Conditions:
    """One simulated fit. Times are in seconds; what docs/scaling.md does not call measured is assumed."""

    seed: int = 0
    actors: Count = 1000
    """The most at once, of one vCPU each."""
    per_node: Count = 8
    tasks: Count = 10_000_000
    block: Count = 1024
    """Tasks in a block."""
    task_s: Positive = 0.02
    """One actor's time for one task."""
    sigma: Amount = 0.25
    """Standard deviation of the logarithm of a block's time."""
    hiccups: Share = 0.002
    """How many blocks take `hiccup_factor` times as long when they are first tried."""
    hiccup_factor: Annotated[float, Field(ge=1)] = 8.0
    slow: Share = 0.02
    """How many nodes are `slow_factor` times slower."""
    slow_factor: Annotated[float, Field(ge=1)] = 3.0
    lifetime_s: Positive | None = None
    """Mean of the exponential time until a node is taken away, if ever."""
    notice_s: Amount = 0.0
    """How long before that it is known."""
    boot_s: Amount = 90.0
    """Median time from the demand for a node to the node."""
    boot_sigma: Amount = 0.3
    nodes_per_s: Positive = 5.0
    """How fast the cloud starts nodes."""
    start_s: Amount = 5.0
    """An actor's imports, and its reading of the features."""
    idle_s: Amount = 60.0
    """After how long an autoscaler gives an empty node back."""
    latency_s: Amount = 0.1
    """Of a commit."""
    store_mb_per_s: Positive = 5000.0
    """What the store takes from all actors together."""
    task_kb: Amount = 10.0
    """A task's targets in the store."""
    calls_per_s: Positive = 2330.0
    """How many results the driver handles."""
    usd_per_vcpu_hour: Amount = 0.015
    usd_per_hour: Amount = 0.2
    """Of the head node."""
    usd_per_commit: Amount = 5e-6

    @property
    def num_blocks(self) -> int:
        """The last block counts as a whole one."""
        return math.ceil(self.tasks / self.block)


class Draws:
    """What chance decides, by number of the block and of the node: the same for every way to assign blocks."""

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = c = conditions
        rng = np.random.default_rng([c.seed, 0])
        self.work: Sequence[float] = (c.block * c.task_s * np.exp(c.sigma * rng.standard_normal(c.num_blocks) - c.sigma**2 / 2)).tolist()
        self.hiccups = set(np.flatnonzero(rng.random(c.num_blocks) < c.hiccups).tolist())

    @cached_property
    def useful_s(self) -> float:
        """Actor-seconds of all blocks, each done once on a node of ordinary speed."""
        return math.fsum(self.work)

    def node(self, number: int) -> tuple[float, float, float]:
        """Of the node that is asked for as this one: seconds to boot, its slowness, seconds to live."""
        c, rng = self._conditions, np.random.default_rng([self._conditions.seed, 1, number])
        boot = c.boot_s * math.exp(c.boot_sigma * rng.standard_normal())
        slowness = c.slow_factor if rng.random() < c.slow else 1.0
        return boot, slowness, rng.exponential() * (c.lifetime_s or math.inf)
