"""Trainings whose ranks, drivers, nodes and files are harmed, and which end with the same weights."""

import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from metadiff.metrics import read_rows
from metadiff.parallel import ALONE
from tests.chaos.commands import Fit, kill, python, wait_until
from tests.chaos.conftest import CLUSTER
from tests.chaos.ledger import CHECKPOINT, GONE, GROWN, NODE, RANK, SNAPSHOT, STARTER, Ledger
from tests.chaos.raylets import Raylets, raylets
from tests.chaos.training import PROGRAM, loop, ranks_under, steps
from tests.distributed.test_elasticity import ask, drain
from tests.tiny import write_config

pytestmark = pytest.mark.chaos

TWICE = 2
SECTIONS = {
    "episodes": {"shots": [1]},
    "targets": {"num_tasks": 400},
    "train": {"iterations": 2500, "batch_size": 256, "checkpoint_every": 100},
    "ray": {"num_workers": 0, "num_actors": 0},
    "loader": {"kind": "memory"},
}
PAIR = ["ray.num_workers=2", "ray.max_failures=100"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]) -> Path:
    """A folder with a run that has all that training needs, and its configuration beside it."""
    folder = tmp_path_factory.mktemp("prepared")
    config = write_config(folder, **SECTIONS)
    made = python("-m", "distributed.fit_targets", str(config), environment=environment)
    assert made.returncode == 0, made.stderr
    return folder


NewTraining = Callable[[], Fit]


@pytest.fixture
def new_training(prepared: Path, environment: Mapping[str, str], tmp_path: Path) -> Iterator[NewTraining]:
    """Makes trainings of two ranks: the real command, on a run of its own."""
    begun: list[Fit] = []

    def new() -> Fit:
        run = tmp_path / f"{len(begun)}" / "tiny"
        shutil.copytree(prepared / "runs" / "tiny", run)
        begun.append(Fit(run, [str(prepared / "tiny.yaml"), *PAIR], environment, program=("-m", "distributed.train")))
        return begun[-1]

    yield new
    for training in begun:
        training.close()


def test_of_two_ranks(new_training: NewTraining, trainings: Ledger, rng: random.Random) -> None:
    """Two each of what can befall it on one machine, in an order that is drawn; the weights are the same to the bit."""
    undisturbed = new_training().start()
    undisturbed.finish()
    kinds = [*(RANK, STARTER, CHECKPOINT, SNAPSHOT) * TWICE]
    rng.shuffle(kinds)
    while kinds:
        training, hits = new_training().start(), dict.fromkeys(kinds, 0)
        while kinds and goes_on(training):
            if FAULTS[kinds[-1]](training, rng):
                hits[kind := kinds.pop()] += 1
                trainings.open[kind] += 1
        training.finish()
        for name in ("1shot.safetensors", "1shot.jsonl"):
            assert (results(training) / name).read_bytes() == (results(undisturbed) / name).read_bytes()
        assert not list(results(training).glob("*checkpoint*"))
        trainings.close({kind: count for kind, count in hits.items() if count})


def results(training: Fit) -> Path:
    return training.folder / "train" / "stable"


def unfinished(training: Fit) -> Path:
    """Where the training is built until it is done."""
    (folder,) = {path.parent for path in (training.folder / "train").rglob("*.attempt")} or {results(training)}
    return folder


def goes_on(training: Fit) -> bool:
    """Wait for a checkpoint more; False if the training comes to its end first."""
    before = max(steps(unfinished(training)), default=0)
    wait_until(lambda: not training.running or max(steps(unfinished(training)), default=0) > before, "checkpoints")
    return training.running


def kill_rank(training: Fit, rng: random.Random) -> bool:
    lost, victims = training.last_words.count("a worker was lost"), ranks_under([training.pid])
    if not (victims and kill(rng.choice(victims))):
        return False
    wait_until(lambda: training.last_words.count("a worker was lost") > lost or not training.running, "the ranks' return")
    return training.last_words.count("a worker was lost") > lost


def kill_driver(training: Fit, rng: random.Random) -> bool:
    hit = training.kill()
    training.start()
    return hit


def truncate(training: Fit, rng: random.Random) -> bool:
    """The newest checkpoint, and kill the driver, so that the damage is met."""
    if not training.kill():
        return False
    folder = unfinished(training)
    newest = folder / f"1shot.checkpoint-{steps(folder)[-1]}.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[: rng.randrange(len(content))])
    training.start().wait_until_it_says("unfinished or damaged; ")
    return training.running


def damage_snapshot(training: Fit, rng: random.Random) -> bool:
    """What Ray would resume from, in all attempts there are; and kill a rank."""
    for storage in training.folder.glob(".ray/*/ray/train"):
        (storage / "checkpoint_manager_snapshot.json").write_bytes(rng.randbytes(100))
    return kill_rank(training, rng)


FAULTS: Mapping[str, Callable[[Fit, random.Random], bool]] = {
    RANK: kill_rank,
    STARTER: kill_driver,
    CHECKPOINT: truncate,
    SNAPSHOT: damage_snapshot,
}


@pytest.fixture
def nodes(environment: Mapping[str, str]) -> Iterator[Raylets]:
    """A cluster of its own, without worker nodes yet."""
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp") as folder, raylets(Path(folder), {**environment, **CLUSTER}) as nodes:
        yield nodes


def test_of_as_many_ranks_as_there_is_room_for(nodes: Raylets, trainings: Ledger, environment: Mapping[str, str], tmp_path: Path) -> None:
    """Nodes come, die, and are taken away with notice, and so do drivers; the weights are the same up to rounding."""
    alone, folder = tmp_path / "alone", tmp_path / "1" / "d"
    alone.mkdir()
    folder.mkdir(parents=True)
    loop(ALONE, alone)
    training = Fit(folder, [nodes.address, str(folder)], {**environment, **CLUSTER}, program=PROGRAM)
    (folder / "slow").touch()
    try:
        besiege(training, nodes, trainings)
    finally:
        training.close()
    one, losses = load_file(alone / "d.safetensors"), [row["loss"] for row in read_rows(alone / "d.jsonl")]
    for name, value in load_file(folder / "d.safetensors").items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-5)
    assert [row["loss"] for row in read_rows(folder / "d.jsonl")] == pytest.approx(losses, abs=1e-5)
    trainings.close({GROWN: 2, NODE: 1, GONE: 1, STARTER: 1})


def besiege(training: Fit, nodes: Raylets, trainings: Ledger) -> None:
    nodes.add()
    training.start()
    wait_for_workers(training, 1)
    for kind in (NODE, GONE):
        nodes.add()
        wait_for_workers(training, 2)
        assert steps(training.folder), "all were ready to be stopped when the node joined"
        trainings.open[GROWN] += 1
        victim = next(raylet for raylet in nodes.alive if ranks_under([raylet.pid]))
        if kind == GONE:
            give_notice(training, nodes, victim)
        assert kill(victim)
        wait_for_workers(training, 1)
        trainings.open[kind] += 1
    assert training.kill()
    training.start()
    wait_for_workers(training, 1)
    trainings.open[STARTER] += 1
    (training.folder / "slow").unlink()
    training.finish()


def wait_for_workers(training: Fit, number: int) -> None:
    """Until so many train."""
    words = [f"ray: {number} worker{'s' * (number > 1)} now"]

    def training_goes_on() -> bool:
        assert training.running, training.last_words
        last = training.last_words.rpartition("ray: ")
        return any(word in "".join(last[1:]) for word in words) and "it/s" in last[2]

    wait_until(training_goes_on, words[0])


def give_notice(training: Fit, nodes: Raylets, victim: psutil.Process) -> None:
    """Announce that a node is to go, and wait for the checkpoint that is owed to it."""
    address = next(word.partition("=")[2] for word in victim.cmdline() if word.startswith("--node_ip_address="))
    known = dict(ask(nodes, "[[node.ip_address, node.node_id] for node in [*status.active_nodes, *status.idle_nodes]]"))
    before = steps(training.folder)
    drain(nodes, known[address], "--deadline-remaining-seconds", "600")
    wait_until(lambda: steps(training.folder)[-1] > before[-1], "the checkpoint before the node goes")
