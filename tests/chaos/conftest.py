"""The seed, the table of faults, and what the cases share: a reference, a cluster, an S3 service behind a proxy."""

import contextlib
import io
import itertools
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.case import Case, NewCase, Reference, artifact
from tests.chaos.commands import ROOT, SECTIONS, Fit, python
from tests.chaos.ledger import TRAINING_KINDS, Ledger
from tests.chaos.places import Bucket, Folder, Place, contents
from tests.chaos.proxy import Proxy, proxy
from tests.chaos.raylets import Raylets, raylets
from tests.tiny import write_config

SEED = "METADIFF_CHAOS_SEED"
BUCKET = "targets"

_seed = os.environ.get(SEED) or secrets.token_hex(4)
_ledger, _trainings = Ledger(), Ledger(TRAINING_KINDS, "trainings", "weights")
_ACCESS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tally comes last."""
    items.sort(key=lambda item: item.path.name == "test_tally.py")


def pytest_report_collectionfinish(items: list[pytest.Item]) -> str:
    """The seed, where there is something to draw."""
    return f"chaos: {SEED}={_seed}" if any(item.get_closest_marker("chaos") for item in items) else ""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The tables."""
    for ledger in (_ledger, _trainings):
        if any(map(ledger.hits, ledger.open)):
            terminalreporter.section(f"faults, {SEED}={_seed}")
            for line in ledger.table():
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def ledger() -> Ledger:
    return _ledger


@pytest.fixture(scope="session")
def trainings() -> Ledger:
    return _trainings


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """This test's random numbers, which depend on the seed and its name alone."""
    return random.Random(f"{_seed} {request.node.name}")


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Of the commands: one thread, nothing of the user's own Ray or S3."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    nobodys = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return {**inherited, **own, **_ACCESS, **nobodys}


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, environment: Mapping[str, str]) -> Reference:
    """A run with all that fitting needs, and what comes of it without faults."""
    folder = tmp_path_factory.mktemp("reference")
    config = write_config(folder, **SECTIONS)
    made = python("-m", "distributed.embed", str(config), environment=environment)
    assert made.returncode == 0, made.stderr
    run = folder / "runs" / "tiny"
    copy, store = folder / "undisturbed" / "tiny", Folder(folder / "store")
    shutil.copytree(run, copy)
    Fit(copy, [str(config), *store.options], environment).start().finish()
    files = contents(store)
    return Reference(config, run, files, artifact(copy))


@pytest.fixture
def new_case(reference: Reference, ledger: Ledger, environment: Mapping[str, str], tmp_path: Path, rng: random.Random) -> Iterator[NewCase]:
    """Makes this test's cases."""
    numbers = itertools.count()
    with contextlib.ExitStack() as on_exit:

        def new(*options: str, place: Place | None = None, **variables: str) -> Case:
            folder = tmp_path / str(next(numbers))
            place = place or Folder(folder / "store")
            return Case(folder, rng, ledger, reference, place, {**environment, **variables}, options, on_exit=on_exit)

        yield new


@pytest.fixture(scope="session")
def cluster(environment: Mapping[str, str]) -> Iterator[Raylets]:
    """Raylets, none of them with CPUs yet."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    with raylets(folder, {**environment, **CLUSTER}) as cluster:
        yield cluster
    shutil.rmtree(folder)


CLUSTER = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""On loopback alone, for cluster and commands."""


@pytest.fixture
def on_cluster(cluster: Raylets, new_case: NewCase) -> NewCase:
    """Makes cases whose commands work on a cluster of two worker nodes."""
    cluster.fill(2)

    def new(*options: str, place: Place | None = None) -> Case:
        return new_case(f"ray.address={cluster.address}", "ray.num_actors=2", *options, place=place, **CLUSTER)

    return new


@pytest.fixture(scope="session")
def s3() -> Iterator[tuple[Proxy, Any]]:
    """A proxy before moto's S3, and a client that goes past it."""
    import boto3
    from moto.server import ThreadedMotoServer

    with contextlib.redirect_stderr(io.StringIO()):
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        client = boto3.Session(*list(_ACCESS.values())[:2], region_name="us-east-1").client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        with proxy(host, port) as front:
            yield front, client
        client.close()
        server.stop()


@pytest.fixture
def bucket(s3: tuple[Proxy, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes places in the bucket."""
    numbers = itertools.count()
    yield lambda: Bucket(s3[1], BUCKET, f"{request.node.name}/{next(numbers)}", s3[0].url)
    s3[0].clear()
