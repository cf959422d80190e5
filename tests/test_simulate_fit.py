import json
import math

import pytest

from benchmarks.fit_cloud import Conditions, Draws
from benchmarks.fit_simulation import Result, Simulation
from benchmarks.simulate_fit import POLICIES, bound, changed, main, mean_result, read_conditions

EVEN = Conditions(
    actors=4,
    per_node=2,
    tasks=4000,
    block=100,
    task_s=0.01,
    sigma=0.0,
    hiccups=0.0,
    slow=0.0,
    boot_s=10.0,
    boot_sigma=0.0,
    start_s=5.0,
    idle_s=60.0,
    latency_s=0.1,
    calls_per_s=1e6,
    nodes_per_s=1e6,
)
"""Forty blocks of a second on four actors."""

HARD = {"sigma": 0.25, "slow": 0.1, "slow_factor": 4.0, "hiccups": 0.01, "boot_sigma": 0.3, "lifetime_s": 200.0}
ROUGH = changed(EVEN, actors=32, per_node=4, tasks=200_000, **HARD)


def simulate(conditions: Conditions, policy: str = "engine", limit_s: float = math.inf) -> Result:
    result = Simulation(conditions, Draws(conditions), POLICIES[policy](conditions)).run(limit_s)
    assert result is not None
    return result


@pytest.mark.parametrize("policy", POLICIES)
def test_where_all_is_even_the_times_are_those_of_arithmetic(policy: str) -> None:
    result = simulate(EVEN, policy)
    assert result.wall_s == pytest.approx(10 + 5 + 10 * 1.1, abs=0.01)
    assert result.efficiency == pytest.approx(40 / (4 * (result.wall_s + 60)), rel=1e-6)
    assert result.usd == pytest.approx((4 * (result.wall_s + 60) * 0.015 + result.wall_s * 0.2) / 3600 + 40 * 5e-6, rel=1e-6)
    assert (result.redone, result.copies, result.nodes) == (0, 0, 2)


def test_the_store_s_bandwidth_is_for_all_together() -> None:
    slow = changed(EVEN, store_mb_per_s=0.5)
    # A shard of a megabyte takes two seconds of it, one after another.
    assert simulate(slow).wall_s == pytest.approx(15 + 1 + 40 * 2 + 0.1, abs=0.01)


def test_a_slow_driver_is_what_all_wait_for() -> None:
    result = simulate(changed(EVEN, calls_per_s=2.0))
    assert result.wall_s > 40 / 2
    assert result.late_s > 1


def test_a_lost_node_costs_the_engine_its_blocks_and_a_static_share_all_of_it() -> None:
    engine, static, resumed = (simulate(ROUGH, policy) for policy in POLICIES)
    assert engine.nodes > 8
    assert 0 < engine.redone < 0.1
    assert static.redone > 2 * engine.redone
    assert engine.wall_s < resumed.wall_s < static.wall_s
    assert engine.efficiency > static.efficiency


def test_a_notice_lets_actors_finish_what_they_are_at() -> None:
    spot = changed(ROUGH, slow=0.0, hiccups=0.0)
    assert simulate(changed(spot, notice_s=30.0)).redone < simulate(spot).redone / 2


def test_stragglers_are_doubled() -> None:
    rough = changed(ROUGH, lifetime_s=None, block=1000)
    result = simulate(rough)
    assert result.copies > 0
    assert result.wall_s < simulate(rough, "resumed").wall_s


def test_the_bound_is_never_beaten_where_nodes_are_all_alike() -> None:
    assert simulate(EVEN).efficiency <= bound(EVEN) == pytest.approx(40 / (40 + 4 * 75))


def test_what_would_not_end_is_given_up() -> None:
    hard = changed(EVEN, tasks=100_000, lifetime_s=20.0)
    assert Simulation(hard, Draws(hard), POLICIES["static"](hard)).run(limit_s=3000) is None
    assert mean_result(hard, POLICIES["engine"], seeds=1) is not None


def test_the_same_seed_gives_the_same() -> None:
    assert simulate(ROUGH) == simulate(ROUGH)
    assert simulate(ROUGH) != simulate(changed(ROUGH, seed=1))


def test_the_last_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks=20000", "actors=16", "block=200", "task_s=0.1"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["conditions"]["actors"] == 16
    assert results["usd_resumed_over_engine"] > 0.9
    assert list(results["fits"]["all of it"]) == ["1", "16"]
    assert results["knobs"]["ahead"]["1"] == results["knobs"]["straggler"]["1.0"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("acters=3", "did you mean 'actors'"), ("actors=0", "greater than 0"), ("7", "expected key=value"), ("tasks=[1", "not valid YAML")],
)
def test_bad_input_is_one_line(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


def test_conditions_come_from_the_command_line() -> None:
    conditions = read_conditions(["actors=3", "lifetime_s=60", "seed=1"])
    assert (conditions.actors, conditions.lifetime_s, conditions.seed, conditions.block) == (3, 60.0, 1, Conditions().block)
