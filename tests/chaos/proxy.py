"""A proxy before an S3 service that does to single requests what networks and services do."""

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.chaos.ledger import ANSWERS_500, ANSWERS_503, CUT, LOST, SLOW

HOLD, HOLD_ANSWER = "held in the middle of its body", "held before its answer"

_ERRORS = {ANSWERS_500: (500, "InternalError"), ANSWERS_503: (503, "SlowDown")}
_PIECES = 10
_HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


@dataclass(eq=False)
class Fault:
    """What is to happen to some requests.

    Attributes:
        kind: one of the ledger's, or HOLD or HOLD_ANSWER.
        method: of the requests.
        name: the last part of their path.
        times: how many of them.
        seconds: how long a slow one takes.
        hits: to how many it has happened.
        reached: set when a request is held; `client_port` is its sender's.
        release: lets it go on.
    """

    kind: str
    method: str
    name: str
    times: int = 1
    seconds: float = 1.0
    hits: int = 0
    client_port: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)

    def hold(self, port: int) -> None:
        """Tell whose request is held, and wait."""
        self.client_port = port
        self.reached.set()
        self.release.wait()


class Proxy(ThreadingHTTPServer):
    """Listens on loopback and forwards one request at a time, as S3's own order of writes is one."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.one_at_a_time, self.lock = (host, port), threading.Lock(), threading.Lock()
        self.faults: list[Fault] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, name: str) -> Fault | None:
        """The next fault for such a request, counted as having hit."""
        with self.lock:
            for fault in self.faults:
                if (fault.method, fault.name) == (method, name) and fault.hits < fault.times:
                    fault.hits += 1
                    return fault
        return None

    def hits(self, kind: str) -> int:
        """How often this kind has hit."""
        return sum(fault.hits for fault in self.faults if fault.kind == kind)

    def clear(self) -> None:
        """No faults any more; nothing is held."""
        with self.lock:
            for fault in self.faults:
                fault.release.set()
            self.faults = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed hang up: no news."""


@contextmanager
def proxy(host: str, port: int) -> Iterator[Proxy]:
    """A proxy in a thread before the service there."""
    with Proxy(host, port) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.clear()
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def proxy(self) -> Proxy:
        assert isinstance(self.server, Proxy)
        return self.server

    def _serve(self) -> None:
        fault = self.proxy.fault(self.command, self.path.partition("?")[0].rpartition("/")[2])
        length = int(self.headers.get("Content-Length", 0))
        if fault is None:
            self._answer(*self._forward(self.rfile.read(length)))
        else:
            _DEEDS[fault.kind](self, fault, length)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def refuse(self, fault: Fault, length: int) -> None:
        self.rfile.read(length)
        status, code = _ERRORS[fault.kind]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>so it is</Message></Error>".encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def trickle(self, fault: Fault, length: int) -> None:
        """Read slowly, and answer slowly: a piece at a time."""
        pause = threading.Event()
        parts = []
        for piece in range(_PIECES):
            parts.append(self.rfile.read(length * (piece + 1) // _PIECES - length * piece // _PIECES))
            pause.wait(fault.seconds / 2 / _PIECES)
        status, headers, body = self._forward(b"".join(parts))
        self._head(status, headers)
        for piece in range(_PIECES):
            self.wfile.write(body[len(body) * piece // _PIECES : len(body) * (piece + 1) // _PIECES])
            pause.wait(fault.seconds / 2 / _PIECES)

    def cut(self, fault: Fault, length: int) -> None:
        """The service gets half of the body, and both ends a connection that breaks."""
        half = self.rfile.read(length // 2)
        with socket.create_connection(self.proxy.upstream) as upstream:
            head = f"{self.requestline}\r\n" + "".join(f"{key}: {value}\r\n" for key, value in self._passed_on()) + "\r\n"
            upstream.sendall(head.encode("latin-1") + half)
        self._hang_up()

    def lose_answer(self, fault: Fault, length: int) -> None:
        self._forward(self.rfile.read(length))
        self._hang_up()

    def hold(self, fault: Fault, length: int) -> None:
        half = self.rfile.read(length // 2)
        fault.hold(self.client_address[1])
        rest = self.rfile.read(length - len(half))
        if len(half) + len(rest) == length:
            self._answer(*self._forward(half + rest))
        else:
            self.close_connection = True

    def hold_answer(self, fault: Fault, length: int) -> None:
        answer = self._forward(self.rfile.read(length))
        fault.hold(self.client_address[1])
        self._answer(*answer)

    def _passed_on(self) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.headers.items() if key.lower() not in _HOP_BY_HOP]

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with self.proxy.one_at_a_time:
            upstream = http.client.HTTPConnection(*self.proxy.upstream)
            upstream.request(self.command, self.path, body, dict(self._passed_on()))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
        return answer.status, [(key, value) for key, value in answer.getheaders() if key.lower() not in _HOP_BY_HOP], content

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._head(status, headers)
        self.wfile.write(body)

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


_DEEDS: dict[str, Callable[[_Handler, Fault, int], None]] = {
    ANSWERS_500: _Handler.refuse,
    ANSWERS_503: _Handler.refuse,
    SLOW: _Handler.trickle,
    CUT: _Handler.cut,
    LOST: _Handler.lose_answer,
    HOLD: _Handler.hold,
    HOLD_ANSWER: _Handler.hold_answer,
}
