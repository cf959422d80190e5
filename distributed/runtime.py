"""Ray: one connection or private instance for a command, and work dealt out to its actors."""

import atexit
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from distributed.actors import Actor, Worker
from distributed.crew import Crew
from distributed.guardian import environment, guarded_folder
from distributed.resources import RayConfig, an_address, check_resources, room
from distributed.scheduling import Dispatcher
from distributed.tally import Watch, results_here
from metadiff.errors import UserError
from metadiff.pipeline import say

B = TypeVar("B", bound=Hashable)

_PROBE_SECONDS = 5
_HTTP2_SETTINGS = b"\x04"
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + b"\0\0\0\0\0"
_OBJECT_STORE_BYTES = 256 * 2**20

# No statistics, no changed working directory, no prefixed prints, and no reports of dead workers (the actors' driver has its own).
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}
# Ray would run its workers at nice 15, behind everything else on the machine. Given a token, it does not write one into the home; it
# is one for the whole process, because Ray keeps what it has read.
_PRIVATE_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# "No clusters here": all ports listen on loopback alone. Ray reads it when it is imported.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Whom the probe took for Ray and is not would keep Ray trying for a quarter of an hour.
_CLUSTER_ENVIRONMENT = {"RAY_gcs_server_port_wait_time_s": "1", "RAY_py_gcs_connect_timeout_s": "10"}

_opened = ExitStack()
atexit.register(_opened.close)


@contextmanager
def session() -> Iterator[None]:
    """Whatever `connect` opened within is closed at the end, however that comes about; SIGTERM unwinds like Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    _unwind_at_sigterm()
    try:
        yield
    finally:
        _opened.close()
        signal.signal(signal.SIGTERM, before)


def connect(settings: RayConfig) -> None:
    """Connect to Ray unless that is done: to the cluster at `settings.address`, or to a private instance on loopback.

    The instance's processes die with this one, even by SIGKILL. To be called in the main thread.

    Raises:
        UserError: nothing answers at the address, or it cannot be used from here; or this machine cannot give what is asked for.
    """
    assert threading.current_thread() is threading.main_thread(), "the kernel ties Ray's processes to the thread that started them"
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        return
    check_resources(settings)
    _opened.enter_context(environment(**_ENVIRONMENT))
    try:
        if settings.address is None:
            _start_instance(settings)
        else:
            _join_cluster(settings, settings.address)
    except BaseException:
        _opened.close()
        raise
    _unwind_at_sigterm()


def _start_instance(settings: RayConfig) -> None:
    _opened.enter_context(environment(**_PRIVATE_ENVIRONMENT, **({} if "ray" in sys.modules else _LOOPBACK)))
    if "RAY_AUTH_MODE" not in os.environ:
        _opened.callback(os.environ.pop, "RAY_AUTH_MODE", None)  # where Ray leaves its own choice: the token
    import ray

    if torch.cuda.is_available() and not settings.gpus_per_worker:
        say("ray: this machine's GPU stays unused, because ray.gpus_per_worker=0")
    folder = _opened.enter_context(guarded_folder())
    workers = min([settings.most, *(int(available / each) for each, available in room(settings).values() if each)])
    _opened.callback(_shut_down)
    ray.init(
        address="local",
        num_cpus=workers * settings.cpus_per_worker,
        num_gpus=torch.cuda.device_count(),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
    )


def _join_cluster(settings: RayConfig, address: str) -> None:
    where, address = f"ray.address={address!r}", (os.environ.get("RAY_ADDRESS") if address == "auto" else None) or address
    if address != settings.address:
        where += f" (RAY_ADDRESS={address})"
    if address != "auto":
        _probe(where, address)
    _opened.enter_context(environment(**_CLUSTER_ENVIRONMENT))
    import ray

    _opened.callback(_shut_down)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{where}: cannot connect ({reason}); run the command on a node of a running cluster, with its RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN if it has one"
        ) from error
    has = ray.cluster_resources()
    for kind, each in (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker)):
        needed = max(settings.workers[0], settings.num_actors) * each
        if needed > has.get(kind, 0):
            say(f"ray: the cluster at {address} has {has.get(kind, 0):g} {kind}s now, the configuration asks for {needed:g}")


def _probe(where: str, address: str) -> None:
    """Find out within seconds, and without Ray's own retries and log lines, whether a gRPC server listens there."""
    advice = "start the cluster or correct the address, or leave ray.address out to use this machine alone"
    try:
        host, _, port = str(an_address(address)).rpartition(":")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS) as server:
            server.sendall(_HTTP2_GREETING)
            answer = server.recv(9)
    except OSError as error:
        raise UserError(f"{where}: nothing answers there ({error.strerror or error}); {advice}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if answer[3:4] != _HTTP2_SETTINGS:
        raise UserError(f"{where}: what answers there is not Ray; {advice}")


def _shut_down() -> None:
    import ray

    ray.shutdown(wait_for_processes=True)


def _unwind_at_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def work_through(
    worker_class: type[Worker],
    arguments: Sequence[Any],
    blocks: Sequence[B],
    settings: RayConfig,
    attempts: int = 3,
    watch: Watch = lambda _: None,
) -> Iterator[tuple[B, Any]]:
    """Run `worker_class(*arguments).run(block)` for every block, by actors, and yield each block with its result as it comes.

    Exactly one result a block comes out, but a block may run more than once, and at the same time: what it leaves must not depend on that.

    Args:
        arguments: picklable, and best small (paths): every actor gets a copy.
        attempts: how often a block may raise an error.
        watch: is told how it goes.

    Raises:
        UserError, OSError: what a worker raised, as it was; of an OSError, disk space and permissions. Not `StoreUnavailable`, whose
            block is tried again after a pause, which grows.
        GivenUp: blocks failed in every attempt, or killed their worker every time; raised when all others are done, or at once if
            nothing goes well.
        Unfinished: no actor can be started.
    """
    dispatcher: Dispatcher[int, B] = Dispatcher(blocks, attempts, ahead=1)
    if settings.num_actors == 0:
        yield from results_here(Actor((worker_class, arguments)), dispatcher, watch)
    elif blocks:
        connect(settings)
        crew = Crew(worker_class, arguments, dispatcher, settings.num_actors, settings.cpus_per_worker, settings.gpus_per_worker, watch)
        try:
            yield from crew.results()
        finally:
            crew.dismiss()
