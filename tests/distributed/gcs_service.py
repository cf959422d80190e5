"""A local Cloud Storage: the emulator's, with the preconditions that it does not know, and failing on demand."""

import io
import json
import logging
import socket
import threading
from collections import deque
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.storage import Storage

logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
logging.getLogger("api").setLevel(logging.CRITICAL)


class ConditionNotMet(Exception):
    """What a request demands of an object's generation is not so."""


class Objects(Storage):
    """The emulator's buckets; `ifGenerationMatch=0` keeps what is there, and a piece of an upload may come twice."""

    def __init__(self) -> None:
        super().__init__(use_memory_fs=True)
        self.condition: str | None = None
        self.conditions: dict[str, str | None] = {}

    def create_resumable_upload(self, bucket_name: str, file_name: str, file_obj: dict[str, Any]) -> str:
        upload = super().create_resumable_upload(bucket_name, file_name, file_obj)
        self.conditions[upload] = self.condition
        return upload

    def add_to_resumable_upload(
        self, file_id: str, content: bytes, total_size: int | None = None, expected_start: int | None = None
    ) -> bytes | None:
        # As Google's own service does: what it has already, it passes over.
        known = self.get_resumable_byte_count(file_id) - expected_start if expected_start is not None else 0
        return super().add_to_resumable_upload(file_id, (content or b"")[known:], total_size, None)

    def create_file(self, bucket_name: str, file_name: str, content: bytes, file_obj: dict[str, Any], file_id: str | None = None) -> None:
        condition = self.conditions.pop(file_id, None) if file_id else self.condition
        if condition == "0" and file_name in self.objects.get(bucket_name, {}):
            raise ConditionNotMet
        super().create_file(bucket_name, file_name, content, file_obj, file_id)


class GcsService:
    """One request at a time, as the service's own order of writes is one.

    Attributes:
        faults: for the next requests for objects, in order: "" for none, a status such as "503", "lost" to do the work and hang up before
            the answer, "half" to hang up in the middle of it.
    """

    def __init__(self) -> None:
        self.objects, self.lock = Objects(), threading.Lock()
        self.faults: deque[str] = deque()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()

    def make_bucket(self, name: str) -> None:
        if name not in self.objects.buckets:
            create_bucket(name, self.objects)

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class _Handler(server.RequestHandler):
    def __init__(self, service: GcsService, *arguments: Any) -> None:
        self.service = service
        super().__init__(service.objects, *arguments)

    def _serve(self, method: str) -> None:
        line, self.wfile = self.wfile, io.BytesIO()
        with self.service.lock:
            # The client asks for the bucket itself now and then, in the background, and does without an answer.
            fault = self.service.faults.popleft() if self.service.faults and "/o" in self.path else ""
            if fault.isdigit():
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._refuse(int(fault), "so it is")
            else:
                self._answer(method)
            answer = self.wfile.getvalue()
            self.wfile = line
        if fault == "lost":
            answer = b""
        if fault in ("lost", "half"):
            line.write(answer[: len(answer) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            line.write(answer)

    def _answer(self, method: str) -> None:
        self.service.objects.condition = parse_qs(urlparse(self.path).query).get("ifGenerationMatch", [None])[0]
        try:
            server.Router(self).handle(method)
        except ConditionNotMet:
            self._refuse(412, "conditionNotMet")

    def _refuse(self, status: int, message: str) -> None:
        content = json.dumps({"error": {"code": status, "message": message}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_DELETE(self) -> None:
        self._serve("DELETE")
