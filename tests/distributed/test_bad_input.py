"""Bad input to the engine: each mistake gets one clear line, exit code 2, and nothing written."""

import importlib.util
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed.beton import hold
from distributed.pipeline import main
from metadiff.__main__ import main as in_one_process
from tests.refusal import only_error
from tests.tiny import write_config

MEMORY = {"loader": {"kind": "memory"}, "ray": {"num_workers": 0, "num_actors": 0}}


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# name -> (overrides, words of the message)
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "more workers than CPUs": (["ray.num_workers=500"], ("ray.num_workers=500", "500 CPUs", "ray.address")),
    "more actors than CPUs": (["ray.num_actors=100", "ray.cpus_per_worker=3"], ("ray.num_actors=100", "300 CPUs")),
    "a GPU where there is none": (["ray.num_workers=1", "ray.gpus_per_worker=50"], ("50 GPUs", "this machine has")),
    "a negative number of workers": (["ray.num_workers=-1"], ("ray.num_workers=-1",)),
    "an address that is none": (["ray.address=http://head"], ("ray.address", "HOST:PORT")),
    "unknown loader": (["loader.kind=dali"], ("loader.kind='dali'", "ffcv")),
    "unknown write mode": (["beton.write_mode=png"], ("beton.write_mode='png'", "raw")),
    "a typo in an engine section": (["loader.os_cash=true"], ("'loader.os_cash'", "did you mean 'os_cache'")),
    "a batch that workers cannot share": (["ray.num_workers=2", "train.batch_size=5"], ("train.batch_size=5", "2 workers")),
    "a store on another service": (["store.url=ftp://here/there"], ("ftp://here/there", "s3://")),
    "an empty block": (["store.block=0"], ("store.block=0",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_and_nothing_written(mistake: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    overrides, expected = MISTAKES[mistake]
    config = write_config(tmp_path, **MEMORY)
    before = {*tmp_path.rglob("*")}
    assert main([str(config), *overrides]) == 2
    only_error(capfd, *expected)
    assert {*tmp_path.rglob("*")} == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is done up to its targets, without Ray and with FFCV."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([str(write_config(folder, ray=MEMORY["ray"]))], "fit_targets") == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    write_config(tmp_path, ray=MEMORY["ray"])
    return Path(shutil.copytree(finished, tmp_path / "runs" / "tiny"))


def refuse(run: Path, stage: str, capfd: pytest.CaptureFixture, *expected: str, overrides: tuple[str, ...] = ()) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main([str(run.parents[1] / "tiny.yaml"), *overrides], stage) == 2
    only_error(capfd, *expected)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_nothing_answers_at_the_address(run: Path, capfd: pytest.CaptureFixture) -> None:
    address = f"127.0.0.1:{unused_port()}"
    began = time.monotonic()
    overrides = ("ray.num_workers=1", "ray.num_actors=1", f"ray.address={address}")
    refuse(run, "train", capfd, address, "nothing answers", overrides=overrides)
    assert time.monotonic() - began < 60, "no hang"


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped"])
def test_damaged_beton(damage: str, run: Path, capfd: pytest.CaptureFixture) -> None:
    path = run / "prepare" / "base.beton"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": bytes(path.read_bytes()[:-100]), "flipped": bytes(content), "swapped": (run / "prepare/val.beton").read_bytes()}
    path.write_bytes(damaged[damage])
    refuse(run, "embed", capfd, "base.beton", "--force")


def test_half_written_beton_is_written_again(run: Path) -> None:
    prepared = run / "prepare"
    shutil.rmtree(prepared)
    shutil.rmtree(run / "fit_targets")
    partial = run / "prepare.partial"
    partial.mkdir()
    (partial / "base.beton").write_bytes(b"half")
    assert main([str(run.parents[1] / "tiny.yaml")], "prepare") == 0
    assert (prepared / "base.beton").stat().st_size > 1000


def test_beton_in_use_by_another_run(run: Path, capfd: pytest.CaptureFixture) -> None:
    with hold(run / "prepare" / "base.beton"):
        before = (run / "prepare" / "manifest.json").read_bytes()
        assert main([str(run.parents[1] / "tiny.yaml"), "--force"], "prepare") == 2
        only_error(capfd, "base.beton", "in use by another run")
        assert (run / "prepare" / "manifest.json").read_bytes() == before
    assert main([str(run.parents[1] / "tiny.yaml"), "--force"], "prepare") == 0


def test_ffcv_absent(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ffcv"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ffcv", None)
    config = write_config(tmp_path, ray=MEMORY["ray"])
    assert main([str(config)]) == 2
    only_error(capfd, "apt-get install", "libopencv-dev", "metadiff[ffcv]", "loader.kind=memory")
    assert not (tmp_path / "runs").exists()
    assert main([str(config), "loader.kind=memory"], "pretrain") == 0, "which needs none"


@pytest.mark.parametrize(("module", "stage"), [("ray", "embed"), ("tensorboard", "train")])
def test_ray_or_tensorboard_absent(
    module: str, stage: str, run: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    shutil.rmtree(run / "embed")
    refuse(run, stage, capfd, "is not installed", "metadiff[ray]", overrides=("ray.num_actors=1",))


def test_a_folder_for_the_store_that_is_a_file(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    where = ("run.variant=other", f"store.url={tmp_path / 'file' / 'store'}")
    refuse(run, "fit_targets", capfd, "is no folder", "choose another", overrides=where)


def test_store_of_another_configuration(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    store = (f"store.url={tmp_path / 'store'}", "run.variant=other")
    assert main([str(run.parents[1] / "tiny.yaml"), *store], "fit_targets") == 0
    content = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    other = ("run.variant=third", store[0], "targets.num_tasks=20")
    refuse(run, "fit_targets", capfd, "num_tasks=50", "says 20", "store.url", overrides=other)
    assert {path: path.read_bytes() for path in (tmp_path / "store").iterdir()} == content


def test_store_of_another_backbones_bank(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    store = f"store.url={tmp_path / 'store'}"
    assert main([str(run.parents[1] / "tiny.yaml"), store, "run.variant=other"], "fit_targets") == 0
    other = ("pretrain.learning_rate=0.2", "run.variant=third", store)
    assert main([str(run.parents[1] / "tiny.yaml"), "--force", *other], "pretrain") == 0
    assert main([str(run.parents[1] / "tiny.yaml"), *other], "embed") == 0
    refuse(run, "fit_targets", capfd, "made with features=", "store.url", overrides=other)


def test_store_made_with_other_threads(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"store.url={tmp_path / 'store'}"
    assert main([str(run.parents[1] / "tiny.yaml"), store, "run.variant=other"], "fit_targets") == 0
    threads = ("ray.num_actors=1", "ray.cpus_per_worker=2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    refuse(run, "fit_targets", capfd, "threads=1", "says 2", "set ray.cpus_per_worker", overrides=("run.variant=third", store, *threads))


def test_bucket_that_does_not_exist(run: Path, s3: str, capfd: pytest.CaptureFixture) -> None:
    where = ("run.variant=other", "store.url=s3://no-such-bucket/targets", f"store.endpoint_url={s3}")
    refuse(run, "fit_targets", capfd, "no-such-bucket", "create the bucket", overrides=where)


def test_s3_without_credentials(run: Path, s3: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    where = ("run.variant=other", "store.url=s3://bucket/targets", f"store.endpoint_url={s3}")
    refuse(run, "fit_targets", capfd, "s3://bucket/targets", "credentials", overrides=where)


def test_a_whole_fit_through_s3(run: Path, s3: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=s3).create_bucket(Bucket="bucket")
    where = ("run.variant=other", "store.url=s3://bucket/targets", f"store.endpoint_url={s3}", "store.block=16")
    assert main([str(run.parents[1] / "tiny.yaml"), *where], "fit_targets") == 0
    assert (run / "fit_targets/other/targets.npy").read_bytes() == (run / "fit_targets/stable/targets.npy").read_bytes()


def test_the_other_commands_ignore_the_engines_sections(tmp_path: Path) -> None:
    assert in_one_process(["prepare", str(write_config(tmp_path, **MEMORY))]) == 0


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """moto's S3, and credentials that it takes."""
    from moto.server import ThreadedMotoServer

    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
