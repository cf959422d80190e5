"""A real cluster of several raylets on this machine, each at an address of its own; run as a script, it holds them.

In a process of its own, so that neither Ray nor its variables reach the tests' process.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_QUICK_TO_NOTICE = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
_OBJECT_STORE_BYTES = 80 * 2**20


class Raylets:
    """The nodes: a head without CPUs, which is left alone, and workers of one CPU each.

    Attributes:
        address: HOST:PORT for `ray.address`.
    """

    def __init__(self, holder: subprocess.Popen[str]) -> None:
        self._holder, self._workers = holder, []
        self.address = self._told()

    def add(self) -> psutil.Process:
        """Start a worker node, and wait until the cluster knows it; returns its raylet."""
        assert self._holder.stdin
        print("add", file=self._holder.stdin, flush=True)
        raylet = psutil.Process(int(self._told()))
        self._workers.append(raylet)
        return raylet

    def fill(self, num_nodes: int) -> None:
        """Add worker nodes until there are so many."""
        while len(self.alive) < num_nodes:
            self.add()

    @property
    def alive(self) -> list[psutil.Process]:
        """The raylets of the worker nodes."""
        self._workers = [raylet for raylet in self._workers if raylet.is_running() and raylet.status() != psutil.STATUS_ZOMBIE]
        return self._workers

    def _told(self) -> str:
        assert self._holder.stdout
        line = self._holder.stdout.readline().strip()
        assert line, "the cluster's process ended"
        return line


@contextmanager
def raylets(folder: Path, environment: Mapping[str, str]) -> Iterator[Raylets]:
    """A cluster in `folder`, whose path has to be short: there are Unix sockets in it. It ends with this process, however that ends."""
    (folder / "ray").mkdir()  # where Ray leaves the cluster's address, unasked
    with (folder / "stderr").open("w") as stderr:
        holder = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.raylets"],
            cwd=ROOT,
            env={**environment, "RAY_TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with holder:
        try:
            yield Raylets(holder)
        finally:
            holder.communicate()


def _hold() -> None:
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "node_ip_address": "127.0.0.1",
        "_system_config": _QUICK_TO_NOTICE,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    for number, _ in enumerate(sys.stdin, 2):
        node = cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES, node_ip_address=f"127.0.0.{number}")
        print(node.all_processes["raylet"][0].process.pid, flush=True)


if __name__ == "__main__":
    # Ray prints where it likes; what is told is told on a descriptor that nobody else has.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _hold()
    except BaseException:
        traceback.print_exc()
    finally:
        # Left to itself, Ray would drain node after node, for minutes if its head has gone.
        for process in psutil.Process().children(recursive=True):
            process.kill()
        os._exit(0)
