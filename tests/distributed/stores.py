"""Stores of three blocks for tests, and an S3 service that fails on demand."""

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from distributed.store import TargetStore

MINE = {"config": {"targets": {"kind": "ce", "tolerance": 1e-5, "num_tasks": 10}, "store": {"block": 4}}, "features": "f" * 64}
OTHER = {**MINE, "config": {**MINE["config"], "targets": {**MINE["config"]["targets"], "tolerance": 1e-6}}}
BLOCKS = {0: (0, 3), 1: (4, 7), 2: (8, 9)}


@dataclass(frozen=True)
class Place:
    """Where a test's store lies."""

    url: str
    endpoint_url: str | None = None

    def store(self, identity: dict[str, Any] = MINE, fresh: bool = False) -> TargetStore:
        return TargetStore.open(self.url, identity, self.endpoint_url, fresh)


def tensors(block: int) -> dict[str, Tensor]:
    first, last = BLOCKS[block]
    rng, size = torch.Generator().manual_seed(block), last - first + 1
    targets = torch.randn(size, 3, 8, generator=rng).half()
    return {"targets": targets, "classes": torch.randint(0, 64, (size, 3), generator=rng), "accuracy": torch.rand(size, generator=rng)}


def commit(store: TargetStore, block: int) -> bool:
    return store.commit(block, tensors(block), *BLOCKS[block])


def filled(store: TargetStore) -> TargetStore:
    assert [commit(store, block) for block in BLOCKS] == [True] * len(BLOCKS)
    return store


def name(block: int) -> str:
    return f"block-{block:08d}.safetensors"


def content(store: TargetStore, block: int) -> bytes:
    found = store.blobs.get(name(block))
    assert found is not None
    return found


def same(read: dict[str, np.ndarray], block: int) -> bool:
    expected = tensors(block)
    return read.keys() == expected.keys() and all(np.array_equal(read[key], expected[key]) for key in read)


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call


class Service:
    """A WSGI application before moto's: one request at a time, as S3's own order of writes is one, and faults on demand.

    Attributes:
        faults: for the next requests, in order: "" for none, an answer such as "503 SlowDown", "lost" to do the work and hang up
            before the answer, "half" to hang up in the middle of it.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application, self.lock = application, threading.Lock()
        self.faults: deque[str] = deque()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        with self.lock:
            fault = self.faults.popleft() if self.faults else ""
            refused = fault not in ("", "lost", "half")
            answer = b"" if refused else b"".join(self.application(environ, start_response))
        if refused:
            start_response(fault, [("Content-Type", "application/xml")])
            answer = f"<?xml version='1.0'?><Error><Code>{fault.split()[1]}</Code><Message>so it is</Message></Error>".encode()
        if fault == "half":
            yield answer[: len(answer) // 2]
        if fault in ("half", "lost"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        yield answer


def make_bucket(endpoint_url: str, name: str) -> None:
    urlopen(Request(f"{endpoint_url}/{name}", method="PUT")).close()
