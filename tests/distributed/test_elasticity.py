"""Actors on a real cluster of several raylets, whose nodes come, die, and are taken away with notice."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from distributed.runtime import RayConfig, session, work_through
from distributed.tally import Tally
from tests.chaos.raylets import ROOT, Raylets, raylets

_DEADLINE_SECONDS = 180


class Clerk:
    """Leaves a file for each attempt at a block, and waits for the file `go` or `go <block>`, unless the block is `quick-<number>`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, block: str) -> str:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"{block} {os.getpid()} {node}").touch()
        while not block.startswith("quick") and not any((self.folder / name).exists() for name in ("go", f"go {block}")):
            time.sleep(0.02)
        return node


def drive() -> None:
    """The command: `folder address num_actors block ...`."""
    folder, address, num_actors, *blocks = sys.argv[1:]
    seen = Tally()

    def watch(tally: Tally) -> None:
        nonlocal seen
        seen = tally

    with session():
        settings = RayConfig(address=address, num_actors=int(num_actors))
        results = dict(work_through(Clerk, (Path(folder),), blocks, settings, watch=watch))
    print(json.dumps({"results": results, "losses": seen.losses, "most": seen.most}))


class Drive:
    """The command as a process, and what its actors leave in a folder."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process

    def begun(self) -> list[tuple[str, psutil.Process, str]]:
        """Attempts at the slow blocks by actors that are still there: the block, the actor's process, its node."""
        found = [path.name.split() for path in self.folder.glob("slow-* * *")]
        return [(block, psutil.Process(int(pid)), node) for block, pid, node in found if psutil.pid_exists(int(pid))]

    def attempts(self, block: str) -> int:
        return len(list(self.folder.glob(f"{block} *")))

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until something is so, while the command is at work."""
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not condition():
            assert self.process.poll() is None, "the command ended"
            assert time.monotonic() < deadline, sorted(path.name for path in self.folder.iterdir())
            time.sleep(0.05)

    def go(self, block: str = "") -> None:
        (self.folder / f"go {block}".rstrip()).touch()

    def finish(self) -> dict[str, Any]:
        told, _ = self.process.communicate(timeout=_DEADLINE_SECONDS)
        assert self.process.returncode == 0
        return json.loads(told.splitlines()[-1])


ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
    **{"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"},
    **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with tempfile.TemporaryDirectory(prefix="metadiff-", dir="/tmp") as folder, raylets(Path(folder), ENVIRONMENT) as cluster:
        yield cluster


@contextmanager
def command(folder: Path, cluster: Raylets, num_actors: int, *blocks: str) -> Iterator[Drive]:
    script = "from tests.distributed.test_elasticity import drive; drive()"
    words = [sys.executable, "-c", script, str(folder), cluster.address, str(num_actors), *blocks]
    with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Drive(folder, process)
        finally:
            process.kill()


def ask(cluster: Raylets, question: str) -> Any:
    """What the cluster's head says: an expression in `status`, its own account of nodes and demand."""
    script = (
        "import json; from ray.autoscaler.v2.sdk import get_cluster_status as ask;"
        f"status = ask({cluster.address!r}); print(json.dumps({question}))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, check=True).stdout)


def demand(cluster: Raylets) -> int:
    """How many actors wait for room."""
    return ask(cluster, "sum(each.count for entry in status.resource_demands.ray_task_actor_demand for each in entry.bundles_by_count)")


def nodes(cluster: Raylets) -> list[str]:
    """The living nodes' ids."""
    return ask(cluster, "[node.node_id for node in [*status.active_nodes, *status.idle_nodes]]")


def test_pending_actors_are_demand_and_a_new_node_takes_part(cluster: Raylets, tmp_path: Path) -> None:
    cluster.fill(1)
    with command(tmp_path, cluster, 3, "slow-1", "slow-2") as drive:
        drive.until(lambda: drive.begun() and demand(cluster) == 1)  # no more than there are blocks
        cluster.add()
        drive.until(lambda: len(drive.begun()) == 2 and demand(cluster) == 0)
        assert len({node for _, _, node in drive.begun()}) == 2
        drive.go()
        assert {*drive.finish()["results"]} == {"slow-1", "slow-2"}


def test_a_killed_raylet_costs_only_the_block_at_work_there(cluster: Raylets, tmp_path: Path) -> None:
    cluster.fill(2)
    blocks = ["slow-1", "slow-2", *(f"quick-{number}" for number in range(6))]
    with command(tmp_path, cluster, 2, *blocks) as drive:
        drive.until(lambda: len(drive.begun()) == 2)
        lost, actor, node = drive.begun()[0]
        (raylet,) = [raylet for raylet in cluster.alive if raylet in actor.parents()]
        os.kill(raylet.pid, signal.SIGKILL)
        drive.until(lambda: demand(cluster) == 1)  # another in its place
        drive.go()
        done = drive.finish()["results"]
    assert {*done} == {*blocks}
    assert done[lost] != node
    assert {block: drive.attempts(block) for block in blocks} == {block: 2 if block == lost else 1 for block in blocks}


def test_a_node_that_is_drained_gets_no_more_and_is_let_go(cluster: Raylets, tmp_path: Path) -> None:
    cluster.fill(2)
    blocks = [f"slow-{number}" for number in range(6)]
    with command(tmp_path, cluster, 2, *blocks) as drive:
        drive.until(lambda: len(drive.begun()) == 2)
        (block, actor, node), (_, _, other) = drive.begun()
        drain(cluster, node)
        drive.until(lambda: demand(cluster) == 1)  # another in its place
        drive.go(block)
        drive.until(lambda: not actor.is_running() and node not in nodes(cluster))
        drive.go()
        done = drive.finish()
    assert done["results"] == {**dict.fromkeys(blocks, other), block: node}
    assert done["losses"] == 0


def test_a_node_that_is_drained_goes_on_while_its_deadline_is_far(cluster: Raylets, tmp_path: Path) -> None:
    cluster.fill(2)
    blocks = [f"slow-{number}" for number in range(4)]
    with command(tmp_path, cluster, 2, *blocks) as drive:
        drive.until(lambda: len(drive.begun()) == 2)
        block, _, node = drive.begun()[0]
        drain(cluster, node, "--deadline-remaining-seconds", "600")
        drive.until(lambda: demand(cluster) == 1)  # another in its place
        drive.go(block)
        drive.until(lambda: sum(where == node for _, _, where in drive.begun()) == 2)
        drive.go()
        assert {*drive.finish()["results"]} == {*blocks}


def test_idle_actors_are_gone_before_the_end(cluster: Raylets, tmp_path: Path) -> None:
    """All but one, which would take over from the last if that were lost."""
    cluster.fill(3)
    with command(tmp_path, cluster, 3, "slow-1", "slow-2", "slow-3") as drive:
        drive.until(lambda: len(drive.begun()) == 3)
        actors = [actor for _, actor, _ in drive.begun()]
        drive.go("slow-1")
        drive.go("slow-2")
        drive.until(lambda: sum(actor.is_running() for actor in actors) == 2)
        assert demand(cluster) == 0
        drive.go()
        assert drive.finish()["most"] == 3


def drain(cluster: Raylets, node: str, *deadline: str) -> None:
    """What a cloud's notice of a spot instance's end comes to."""
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away", *deadline]
    words = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", node, *why]
    subprocess.run(words, env=ENVIRONMENT, check=True, capture_output=True)
