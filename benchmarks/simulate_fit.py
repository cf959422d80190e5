"""Fitting ten million targets on up to a thousand actors, simulated: the engine's own decisions against static assignment.

    python -m benchmarks.simulate_fit [key=value ...]

`distributed.scheduling.Dispatcher` decides, on a simulated clock, over nodes that boot late, are slow, hang for a while and are taken
away with or without a notice, a store with a latency and a bandwidth for all, and a driver that handles one call at a time. Static
assignment gives each actor its share at the start; where an actor is lost, another does its share again, or (`resumed`) goes on in it.
Both see the same draws. Keys are those of `benchmarks.fit_cloud.Conditions`. The last line is one JSON object.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

from benchmarks.fit_cloud import Conditions, Draws
from benchmarks.fit_simulation import Result, Simulation
from benchmarks.static_assignment import Policy, StaticAssignment
from distributed.scheduling import Dispatcher
from metadiff.config import validate
from metadiff.errors import UserError

_SEEDS = 3
_SIZES = (1, 16, 128)
_GIVE_UP = 30
_NONE = "-"

CALM: Mapping[str, Any] = {}
SPOT = {"lifetime_s": 3600.0}
STRAGGLERS = {"slow": 0.1, "slow_factor": 4.0, "hiccups": 0.01}
SLOW_STORE = {"latency_s": 2.0, "store_mb_per_s": 400.0}
SCENARIOS: Mapping[str, Mapping[str, Any]] = {
    "calm": CALM,
    "spot": SPOT,
    "spot, notice": {**SPOT, "notice_s": 120.0},
    "stragglers": STRAGGLERS,
    "slow store": SLOW_STORE,
    "all of it": {**SPOT, **STRAGGLERS, **SLOW_STORE},
}
POLICIES: Mapping[str, Callable[[Conditions], Policy]] = {
    "engine": lambda c: Dispatcher(range(c.num_blocks)),
    "static": lambda c: StaticAssignment(c.num_blocks, c.actors, resumes=False),
    "resumed": lambda c: StaticAssignment(c.num_blocks, c.actors, resumes=True),
}
KNOBS: Mapping[str, Sequence[float]] = {
    "straggler": (1.0, 0.5, 1.5, 2.0, 3.0, math.inf),
    "spares": (0.05, 0.0, 0.25, 1.0),
    "ahead": (1, 2, 3, 4),
    "block": (1024, 128, 256, 512, 2048, 4096),
}
"""What a dispatcher, or the store, can be set to; first what it is set to."""


def main(arguments: Sequence[str]) -> int:
    """Print the tables; 2 for bad input."""
    try:
        base = read_conditions(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sizes = [*(size for size in _SIZES if size < base.actors), base.actors]
    fits, knobs = {}, {}
    for name, changes in SCENARIOS.items():
        fits[name] = [compare(changed(base, actors=size, **changes)) for size in sizes]
        _print_scenario(name, sizes, fits[name])
    for knob, values in KNOBS.items():
        knobs[knob] = {str(value): _try(base, knob, value, sizes[-1]) for value in values}
        _print_knob(knob, knobs[knob])
    results = {name: dict(zip(map(str, sizes), rows, strict=True)) for name, rows in fits.items()}
    ratios = _ratios(fits["all of it"][-1])
    print(json.dumps({**ratios, "seeds": _SEEDS, "conditions": dataclasses.asdict(base), "fits": results, "knobs": knobs}))
    return 0


def read_conditions(arguments: Sequence[str]) -> Conditions:
    """The conditions that `key=value` arguments ask for.

    Raises:
        UserError: with the first that is wrong.
    """
    tree = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r}: expected key=value, for example tasks=100000")
        try:
            tree[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"{argument!r}: the value is not valid YAML") from None
    return validate(Conditions, tree, "of the simulation")


def changed(conditions: Conditions, **changes: Any) -> Conditions:
    """Other conditions; nodes are no larger than all actors together."""
    new = dataclasses.replace(conditions, **changes)
    return dataclasses.replace(new, per_node=min(new.per_node, new.actors))


def bound(c: Conditions) -> float:
    """The efficiency if nothing went wrong and all ended at once: every node still boots, starts its actors, and is idle at the end."""
    useful = c.tasks * c.task_s
    return useful / (useful + c.actors * (c.boot_s + c.start_s + c.idle_s))


def compare(c: Conditions) -> dict[str, Any]:
    """Means over the seeds for each policy, None where it does not end in reasonable time, and the bound of the efficiency."""
    means = {name: mean_result(c, policy) for name, policy in POLICIES.items()}
    return {"bound": round(bound(c), 4), **means}


def mean_result(c: Conditions, policy: Callable[[Conditions], Policy], seeds: int = _SEEDS) -> dict[str, float] | None:
    """The means of a policy's results."""
    results: list[Result] = []
    for seed in range(seeds):
        drawn = changed(c, seed=c.seed + seed)
        draws = Draws(drawn)
        result = Simulation(drawn, draws, policy(drawn)).run(_GIVE_UP * (c.boot_s + draws.useful_s / c.actors))
        if result is None:
            return None
        results.append(result)
    fields = [field.name for field in dataclasses.fields(Result)]
    return {name: round(fmean(getattr(result, name) for result in results), 4) for name in fields}


def _try(base: Conditions, knob: str, value: float, size: int) -> dict[str, Any]:
    """The engine on the largest crew, with one knob turned."""
    settings: dict[str, Any] = {knob: value}
    if knob == "block":
        conditions, policy = changed(base, actors=size, **settings), POLICIES["engine"]
    else:
        conditions, policy = changed(base, actors=size), lambda c: Dispatcher(range(c.num_blocks), **settings)
    return {name: mean_result(changed(conditions, **SCENARIOS[name]), policy) for name in ("calm", "spot", "all of it")}


def _ratios(row: Mapping[str, Any]) -> dict[str, float | None]:
    """What static assignment takes and costs, over what the engine does; None where it does not end."""
    others = [name for name in POLICIES if name != "engine"]
    return {
        f"{field}_{name}_over_engine": round(row[name][field] / row["engine"][field], 3) if row[name] else None
        for name in others
        for field in ("wall_s", "usd")
    }


def _print_scenario(name: str, sizes: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"\n{name}: efficiency (bound), hours, USD, redone %, copies, for the engine; the same for static assignment, and resumed")
    for size, row in zip(sizes, rows, strict=True):
        engine, static, resumed = (_cell(row[policy]) for policy in POLICIES)
        print(f"  {size:5} actors ({row['bound']:.3f})  {engine}  |{static}  |{resumed}", flush=True)


def _print_knob(knob: str, outcomes: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{knob} (the first is the choice): calm, spot, all of it")
    for value, outcome in outcomes.items():
        print(f"  {value:>6}  " + "  |".join(_cell(result) for result in outcome.values()), flush=True)


def _cell(result: Mapping[str, float] | None) -> str:
    if result is None:
        return f"{_NONE:>36}"
    return (
        f"{result['efficiency']:6.3f}{result['wall_s'] / 3600:8.3f} h{result['usd']:8.2f}"
        f"{100 * result['redone']:6.1f} %{result['copies']:5.0f}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
