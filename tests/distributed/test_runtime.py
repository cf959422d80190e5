import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distributed import runtime
from distributed.actors import Actor
from distributed.blobs import StoreUnavailable
from distributed.runtime import RayConfig, check_resources, connect, session, work_through
from distributed.tally import GivenUp, Tally
from metadiff.config import validate
from metadiff.errors import Unfinished, UserError
from metadiff.pipeline import say
from tests.distributed.test_guardian import ROOT

ACTORS = min(2, len(os.sched_getaffinity(0)))
SETTINGS = RayConfig(num_actors=ACTORS)


class Clerk:
    """Does what a block's name says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, block: str) -> dict[str, Any]:
        say(f"at {block}")
        first = not (self.folder / block).exists()
        with (self.folder / block).open("a") as file:
            file.write(".")
        match block.partition(" ")[0]:
            case "mistake":
                raise UserError("shots=0: one line")
            case "full":
                raise OSError(errno.ENOSPC, "No space left on device", "/data/block")
            case "cut":
                raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
            case "broken":
                raise ValueError("this block is broken")
            case "breaks" if first:
                raise ValueError("only once")
            case "down" if first:
                raise StoreUnavailable("store s3://bucket: the service fails")
            case "meets":
                while len(list(self.folder.glob("meets *"))) < 2:
                    time.sleep(0.01)
            case "dies" if first:
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                time.sleep(60)
        return {"process": os.getpid(), "threads": torch.get_num_threads(), "nice": os.nice(0), "cwd": os.getcwd()}


class Stillborn(Clerk):
    """Cannot be built."""

    def __init__(self, folder: Path) -> None:
        with (folder / "births").open("a") as file:
            file.write(".")
        _ = 1 / 0


def drive() -> None:
    """A command of its own: one block done, said so, and then at work for ever."""
    folder = Path(sys.argv[1])
    with session():
        for block, _ in work_through(Clerk, (folder,), ["quick", "slow 1", "slow 2"], RayConfig(num_actors=1)):
            print(block, sys.modules["ray"].util.get_node_ip_address(), flush=True)


def through(folder: Path, blocks: list[str], settings: RayConfig = SETTINGS) -> list[str]:
    return [block for block, _ in work_through(Clerk, (folder,), blocks, settings)]


def attempts(folder: Path, block: str) -> int:
    return len((folder / block).read_text())


@pytest.fixture(scope="class")
def instance() -> Iterator[None]:
    before = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}
    with session():
        connect(SETTINGS)
        yield
    assert {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")} == before


@pytest.mark.usefixtures("instance")
class TestOnActors:
    def test_every_block_once_though_actors_die(self, tmp_path: Path) -> None:
        blocks = ["a", "dies 1", "b", "c", "dies 2", "d"]
        assert sorted(through(tmp_path, blocks)) == sorted(blocks)
        assert [attempts(tmp_path, f"dies {number}") for number in (1, 2)] == [2, 2]

    @pytest.mark.skipif(ACTORS < 2, reason="needs two cores")
    def test_actors_work_at_the_same_time(self, tmp_path: Path) -> None:
        """Neither block ends before the other has begun: were one taken ahead, they would wait for ever."""
        done = [result["process"] for _, result in work_through(Clerk, (tmp_path,), ["meets 1", "meets 2"], SETTINGS)]
        assert len(set(done)) == 2

    def test_what_happens_is_counted(self, tmp_path: Path) -> None:
        seen: list[Tally] = []
        blocks = ["a", "dies 1", "b", "breaks 1", "c"]
        assert {block for block, _ in work_through(Clerk, (tmp_path,), blocks, SETTINGS, watch=seen.append)} == {*blocks}
        assert (seen[-1].losses, seen[-1].retries) == (1, 1)
        assert 1 <= seen[-1].most <= ACTORS

    def test_a_users_mistake_comes_out_as_it_was_with_what_was_said(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(UserError) as caught:
            through(tmp_path, ["mistake"])
        assert str(caught.value) == "shots=0: one line"
        assert attempts(tmp_path, "mistake") == 1
        assert capfd.readouterr() == ("", "at mistake\n")

    def test_a_broken_block_is_given_up_when_all_others_are_done(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        results = work_through(Clerk, (tmp_path,), ["a", "broken", "b", "c"], RayConfig(num_actors=1), attempts=2)
        assert [block for block, _ in itertools.islice(results, 3)] == ["a", "b", "c"]
        with pytest.raises(GivenUp, match=r"given up, .*: broken \(ValueError: this block is broken\)") as caught:
            next(results)
        assert caught.value.exit_code == 3
        assert [*caught.value.poisoned] == ["broken"]
        assert capfd.readouterr().err.count("Traceback") == 1, "of the worker, for us to mend"
        assert attempts(tmp_path, "broken") == 2

    def test_nothing_goes_on_where_nothing_works(self, tmp_path: Path) -> None:
        with pytest.raises(GivenUp, match=r"given up, .*broken 0"):
            through(tmp_path, [f"broken {number}" for number in range(9)], RayConfig(num_actors=1))
        assert attempts(tmp_path, "broken 0") == 3
        assert not (tmp_path / "broken 8").exists()

    def test_a_service_that_is_down_for_a_while_is_waited_for(self, tmp_path: Path) -> None:
        assert sorted(through(tmp_path, ["a", "down", "b"])) == ["a", "b", "down"]
        assert attempts(tmp_path, "down") == 2

    def test_an_actor_that_cannot_be_built_is_tried_a_few_times(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Unfinished, match=r"no actor can be started \(ZeroDivisionError: "):
            list(work_through(Stillborn, (tmp_path,), ["a"], RayConfig(num_actors=1)))
        assert attempts(tmp_path, "births") == 3
        assert "Traceback" in capfd.readouterr().err

    def test_an_actor_has_its_threads_and_priority_and_ends_when_its_results_are_no_longer_wanted(self, tmp_path: Path) -> None:
        results = work_through(Clerk, (tmp_path,), ["a", "slow"], RayConfig(num_actors=1))
        _, given = next(results)
        process = given.pop("process")
        assert given == {"threads": 1, "nice": os.nice(0), "cwd": os.getcwd()}
        results.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 30
        while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not Path(f"/proc/{process}").exists()

    def test_nothing_to_do_starts_nothing(self, tmp_path: Path) -> None:
        assert through(tmp_path, []) == []

    def test_connecting_again_changes_nothing(self) -> None:
        import ray

        before = ray.get_runtime_context().get_node_id()
        connect(SETTINGS)
        assert ray.get_runtime_context().get_node_id() == before


def marked(mark: str) -> list[str]:
    """The processes, other than the marked command itself, that inherited the mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TEST_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def test_two_commands_at_once_and_nothing_is_left_of_them(tmp_path: Path) -> None:
    """One is killed, which the other does not notice until Ctrl-C reaches its whole process group."""
    script = "from tests.distributed.test_runtime import drive; drive()"
    commands, folders = [], [tmp_path / "killed", tmp_path / "interrupted"]
    for folder in folders:
        (folder / "home").mkdir(parents=True)
        (folder / "tmp").mkdir()
        own = {"HOME": str(folder / "home"), "TEST_MARK": folder.name, "OMP_NUM_THREADS": "1"}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | own
        options: dict[str, Any] = {"cwd": ROOT, "env": environment, "start_new_session": True, "text": True}
        with (folder / "stderr").open("w") as stderr:
            commands.append(subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, stderr=stderr, **options))
    killed, interrupted = commands
    try:
        assert [command.stdout.readline() for command in commands if command.stdout] == ["quick 127.0.0.1\n"] * 2
        begun = psutil.Process(killed.pid).children(recursive=True)
        assert len(begun) > 4, "Ray's own processes among them"
        killed.kill()
        killed.wait()
        assert psutil.wait_procs(begun, timeout=10)[1] == []
        assert marked("killed") == []
        assert interrupted.poll() is None
        assert any("ray::" in process for process in marked("interrupted"))
        os.killpg(interrupted.pid, signal.SIGINT)
        assert interrupted.wait(timeout=60) == -signal.SIGINT
        assert marked("interrupted") == []
        for folder in folders:
            assert not (folder / "home" / ".ray").exists()
            said = (folder / "stderr").read_text()
            assert said.startswith("at quick\n")
            assert "(raylet)" not in said
    finally:
        for command in commands:
            command.kill()
            command.wait()
            if command.stdout:
                command.stdout.close()


def test_what_an_actor_sends_home(tmp_path: Path) -> None:
    actor = Actor((Clerk, (tmp_path,)))
    assert isinstance(actor.run("mistake").error, UserError)
    full = actor.run("full").error
    assert isinstance(full, OSError)
    assert (full.errno, full.filename) == (errno.ENOSPC, "/data/block")
    assert "ConnectionResetError" in str(actor.run("cut").error)
    assert actor.run("a").said == "at a\n"


def test_in_this_process_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "connect", None)
    here = RayConfig(num_actors=0)
    results = dict(work_through(Clerk, (tmp_path,), ["a", "b"], here))
    assert {block: given["process"] for block, given in results.items()} == {"a": os.getpid(), "b": os.getpid()}
    with pytest.raises(UserError, match="one line"):
        through(tmp_path, ["mistake"], here)
    results = work_through(Clerk, (tmp_path,), ["broken 1", "c", "breaks", "broken 2", "broken 3", "down", "d"], here)
    assert {block for block, _ in itertools.islice(results, 4)} == {"c", "breaks", "down", "d"}
    with pytest.raises(GivenUp, match=r"given up, .*broken 1, broken 2, broken 3"):
        next(results)


def test_sigterm_unwinds_and_its_handler_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), session():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", ":6379", "head:port", "head:70000", "local"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(UserError, match=r"address=.*expected nothing .* auto .* or HOST:PORT"):
        validate(RayConfig, {"address": address}, "test")


@pytest.mark.parametrize("address", [None, "auto", "head:6379", "10.0.0.1:6379", "[::1]:6379"])
def test_addresses(address: str | None) -> None:
    assert RayConfig(address=address).address == address


def test_more_than_one_gpu_is_whole() -> None:
    assert RayConfig(gpus_per_worker=0.5).gpus_per_worker == 0.5
    assert RayConfig(gpus_per_worker=2).gpus_per_worker == 2
    with pytest.raises(UserError, match=r"gpus_per_worker=1\.5: above 1 a worker takes whole GPUs"):
        validate(RayConfig, {"gpus_per_worker": 1.5}, "test")


class TestResources:
    @pytest.fixture(autouse=True)
    def two_cpus_one_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_workers": 2},
            {"num_actors": 2},
            {"cpus_per_worker": 2},
            {"gpus_per_worker": 1},
            {"gpus_per_worker": 0.5, "num_actors": 2},
            {"num_workers": 100, "address": "head:6379"},
            {"num_workers": 0, "num_actors": 0, "cpus_per_worker": 100, "gpus_per_worker": 100},
        ],
    )
    def test_enough(self, options: dict[str, Any]) -> None:
        check_resources(RayConfig(**options))

    @pytest.mark.parametrize(
        ("options", "device", "message"),
        [
            ({"num_workers": 3}, "auto", r"ray\.num_workers=3: .*cpus_per_worker=1 it asks for 3 CPUs, this machine has 2; lower"),
            ({"num_actors": 2, "cpus_per_worker": 2}, "auto", r"ray\.num_actors=2: .*cpus_per_worker=2 it asks for 4 CPUs"),
            ({"gpus_per_worker": 2}, "auto", r"ray\.num_workers=1: .*gpus_per_worker=2 it asks for 2 GPUs, this machine has 1"),
            ({"num_actors": 2, "gpus_per_worker": 0.75}, "cuda", "it asks for 1.5 GPUs"),
            ({"gpus_per_worker": 1}, "cpu", r"gpus_per_worker=1 with machine\.device='cpu'"),
            ({"gpus_per_worker": 0}, "cuda", r"machine\.device='cuda' with ray\.gpus_per_worker=0"),
        ],
    )
    def test_too_little(self, options: dict[str, Any], device: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            check_resources(RayConfig(**options), device)


@pytest.fixture
def server() -> Iterator[tuple[str, list[bytes]]]:
    """An address, and what the server there answers: nothing if it is empty."""
    answers: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            try:
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(100)
                        connection.sendall(b"".join(answers)) if answers else connection.recv(100)
            except OSError:
                return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", answers
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def refusal(address: str) -> str:
    with pytest.raises(UserError) as caught, session():
        connect(RayConfig(address=address))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_address_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert refusal(address).startswith(f"ray.address={address!r}: nothing answers there (Connection refused); start the cluster")


def test_an_address_where_nobody_speaks(server: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_PROBE_SECONDS", 0.2)
    assert "nothing answers there (timed out)" in refusal(server[0])


def test_an_address_where_something_else_answers(server: tuple[str, list[bytes]]) -> None:
    server[1].append(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    assert "what answers there is not Ray" in refusal(server[0])


def test_auto_takes_rays_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert refusal("auto").startswith("ray.address='auto' (RAY_ADDRESS=ray://head:10001): expected nothing")


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray looks at all processes of the machine; here it is told what it finds."""
    import ray

    def init(**options: Any) -> None:
        assert options["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    assert refusal("auto").startswith("ray.address='auto': cannot connect (Could not find any running Ray instance.); run the command on")


def test_settings_are_json() -> None:
    from metadiff.config import dump

    assert json.loads(json.dumps(dump(RayConfig()))) == {
        "address": None,
        "num_workers": 1,
        "num_actors": 1,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0.0,
        "max_failures": 3,
    }
