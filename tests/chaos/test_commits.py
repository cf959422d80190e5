"""kill -9 in the middle of a commit: while the shard is written, linked, sent, or while its receipt is awaited."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.chaos.case import Case, NewCase, besiege
from tests.chaos.commands import NUM_BLOCKS, ROOT, Fit, actors, kill, python, wait_until
from tests.chaos.ledger import COMMIT, ENOUGH
from tests.chaos.places import Bucket, Folder, blocks, shard_name
from tests.chaos.proxy import HOLD, HOLD_ANSWER, Fault, Proxy
from tests.chaos.raylets import Raylets
from tests.chaos.watching import Watch

pytestmark = pytest.mark.chaos


def test_in_a_folder(new_case: NewCase) -> None:
    """The temporary file without its writer shows that the kill came between its making and its removal."""
    case = besiege(partial(new_case, "ray.num_actors=2"), kill_writers, COMMIT, ENOUGH // 2)
    swept = new_case(place=case.place)
    swept.fit().start().finish()
    assert isinstance(case.place, Folder)
    assert not case.place.left_over(), "the next start removes what killed writers left"


def test_of_the_artifact(new_case: NewCase) -> None:
    """All shards are there, and the command dies while it makes one array of them, or an artifact of the arrays."""
    case = new_case()
    case.fill(0)
    fit = case.fit()
    for _ in range(2):
        fit.start()
        wait_until(lambda: (fit.folder / "fit_targets" / "stable.partial" / "targets.npy").exists() or not fit.running, "the arrays")
        if fit.kill() and not (fit.folder / "fit_targets" / "stable").exists():
            case.hit(COMMIT)
    fit.start().finish()
    case.prove()


def test_of_what_is_finalized(new_case: NewCase) -> None:
    """All shards are there, and `store finalize` dies at work on the arrays; then it may finish."""
    case = new_case()
    case.fill(0)
    assert isinstance(case.place, Folder)
    words = ("-m", "distributed.store", "finalize", str(case.place.path))
    for _ in range(2):
        watch = Watch(case.place.path)
        with subprocess.Popen([sys.executable, *words], cwd=ROOT, env=case.environment, stdout=subprocess.DEVNULL) as process:
            while not any(".npy" in name for name in watch.next(1.0)) and process.poll() is None:
                pass
            process.kill()
        watch.close()
        if process.returncode == -signal.SIGKILL and "manifest.json" not in case.place.names():
            case.hit(COMMIT)
    assert python(*words, environment=case.environment).returncode == 0
    assert case.place.read("targets.npy") == case.reference.artifact["targets.npy"]
    assert case.verify().returncode == 0
    for name in set(case.place.names()) - set(case.reference.store):
        (case.place.path / name).unlink()
    case.prove()


def test_on_s3(on_cluster: NewCase, new_case: NewCase, cluster: Raylets, s3: tuple[Proxy, object], bucket: Callable[[], Bucket]) -> None:
    """Actors and drivers that are just sending a shard, or have sent it and do not know yet what became of it."""
    proxy = s3[0]
    case, alone = on_cluster(place=bucket()), new_case(place=bucket())
    fit = case.fit().start()
    for kind in (HOLD, HOLD_ANSWER, HOLD):
        kill_a_sender(case, fit, proxy, kind, lambda port: kill(owner([raylet.pid for raylet in cluster.alive], port)))
    fit.finish()
    case.prove()
    fit = alone.fit()
    for kind in (HOLD, HOLD_ANSWER):
        fit.start()
        kill_a_sender(alone, fit, proxy, kind, lambda _: fit.kill())
    fit.start().finish()
    alone.prove()


def kill_writers(case: Case, fit: Fit) -> None:
    assert isinstance(case.place, Folder)
    if not case.wait_for_commits(fit, 1):
        return
    watch = Watch(case.place.path)
    while case.ledger.hits(COMMIT) < ENOUGH // 2 and fit.running:
        if kill_the_writer(watch, case.place, case.rng.random() < 0.5, fit):
            case.hit(COMMIT)
            case.wait_for_commits(fit, 1 + case.rng.randrange(3))
    watch.close()


def kill_the_writer(watch: Watch, place: Folder, all_of_them: bool, fit: Fit) -> bool:
    """Wait for a temporary file and kill the actor that holds it; whether the file outlived it. Both actors die if so drawn."""
    crew = actors([fit.pid])
    watch.next(0)  # what was made before is no longer there
    made = [name for name in watch.next(1.0) if name.endswith(".tmp")]
    if not made:
        return False
    path = place.path / made[-1]
    killed = [kill(actor) for actor in crew if all_of_them or holds(actor, path)]
    return any(killed) and path.exists()


def holds(process: psutil.Process, path: Path) -> bool:
    folder = Path(f"/proc/{process.pid}/fd")
    try:
        return any(os.readlink(folder / number) == str(path) for number in os.listdir(folder))
    except OSError:
        return False


def kill_a_sender(case: Case, fit: Fit, proxy: Proxy, kind: str, strike: Callable[[int], bool]) -> None:
    """Hold a shard that is not there yet, and strike its sender, known by its port."""
    absent = sorted(set(range(NUM_BLOCKS)) - blocks(case.place))
    faults = [Fault(kind, "PUT", shard_name(block)) for block in case.rng.sample(absent, len(absent) // 2)]
    proxy.faults = faults
    wait_until(lambda: any(fault.reached.is_set() for fault in faults) or not fit.running, "a shard that is being sent")
    held = next(fault for fault in faults if fault.reached.is_set())
    assert strike(held.client_port)
    case.hit(COMMIT)
    proxy.clear()


def owner(raylets: list[int], port: int) -> psutil.Process:
    """The actor with this local port."""
    return next(actor for actor in actors(raylets) if any(connection.laddr.port == port for connection in actor.net_connections("tcp")))
