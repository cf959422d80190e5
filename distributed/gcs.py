"""Files in a bucket of Google Cloud Storage, through google-cloud-storage, which finds credentials and STORAGE_EMULATOR_HOST as ever."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from distributed.blobs import StoreUnavailable
from metadiff.errors import UserError

_PIECE_BYTES = 16 * 2**20
_CONNECT_SECONDS, _ANSWER_SECONDS = 5, 30
_PATIENCE_SECONDS, _PROBE_SECONDS = 60, 10
_ADVICE = {
    401: "check the credentials (GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`)",
    403: "these credentials need storage.objects.list, .get, .create and .delete there",
    404: "create the bucket, or set store.url to one that there is",
}
_PASSING = {408, 429}


class GcsBlobs:
    """The objects directly under a prefix of a bucket. See `distributed.blobs.Blobs`."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.where = f"gs://{bucket}/{prefix}"
        self._connect()

    def __reduce__(self) -> tuple[type["GcsBlobs"], tuple[str, str, str | None]]:
        return GcsBlobs, (self.bucket, self.prefix, self.endpoint_url)

    def prepare(self) -> None:
        """See `Blobs`: one request that soon gives up, so that a wrong address or key is told in seconds."""
        with self._explained():
            quick = {"retry": self._retry.with_timeout(_PROBE_SECONDS), "timeout": _CONNECT_SECONDS}
            list(self._client.list_blobs(self.bucket, prefix=self._key(""), max_results=1, **quick))

    def probe(self) -> None:
        """See `Blobs`."""
        self.prepare()

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See `Blobs`."""
        from google.api_core import exceptions

        span = {"start": start, "end": None if stop is None else stop - 1} if start or stop is not None else {}
        with self._explained():
            try:
                return self._patience["retry"](self._download)(name, span)
            except exceptions.NotFound:
                return None
            except exceptions.RequestRangeNotSatisfiable:
                return b""

    def size(self, name: str) -> int | None:
        """See `Blobs`."""
        with self._explained():
            found = self._client.bucket(self.bucket).get_blob(self._key(name), **self._patience)
            return None if found is None else found.size

    def put_new(self, name: str, content: bytes) -> bool:
        """See `Blobs`. A request that is repeated because its answer was lost finds its own object there, and says False."""
        from google.api_core import exceptions

        with self._explained():
            try:
                # Generation 0 is that of an object which is not there.
                self._object(name).upload_from_string(content, if_generation_match=0, **self._patience)
            except exceptions.PreconditionFailed:
                return False
        return True

    def put(self, name: str, content: bytes) -> None:
        """See `Blobs`."""
        with self._explained():
            self._object(name).upload_from_string(content, **self._patience)

    @contextmanager
    def writing(self, name: str, size: int) -> Iterator[Callable[[bytes], object]]:
        """See `Blobs`: a resumable upload. What a killed one left costs nothing, and Google removes it within a week."""
        written = 0
        with self._explained():
            upload = self._object(name).open("wb", chunk_size=_PIECE_BYTES, content_type="application/octet-stream", **self._patience)

        def write(piece: bytes) -> None:
            nonlocal written
            written += len(piece)
            with self._explained():
                upload.write(piece)

        try:
            yield write
            assert written == size, f"{name}: {written} bytes written, {size} announced"
            with self._explained():
                upload.close()
        except BaseException:
            with suppress(Exception):
                upload.terminate()
            raise

    def sizes(self) -> dict[str, int]:
        """See `Blobs`."""
        with self._explained():
            fields = "items(name,size),nextPageToken"
            found = self._client.list_blobs(self.bucket, prefix=self._key(""), delimiter="/", fields=fields, **self._patience)
            return {blob.name.removeprefix(self._key("")): blob.size for blob in found}

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        from google.api_core import exceptions

        with self._explained(), suppress(exceptions.NotFound):
            self._object(name).delete(**self._patience)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _download(self, name: str, span: Mapping[str, int | None]) -> bytes:
        from google.api_core import exceptions

        try:
            return self._object(name).download_as_bytes(raw_download=True, **span, **{**self._patience, "retry": None})
        except exceptions.GoogleAPICallError as error:
            # The client reads answers as they come, and leaves those that it does not like open.
            if error.response is not None:
                error.response.close()
            raise

    def _object(self, name: str) -> Any:
        return self._client.bucket(self.bucket).blob(self._key(name))

    def _connect(self) -> None:
        try:
            from google.cloud import storage
            from google.cloud.storage.retry import DEFAULT_RETRY
        except ImportError:
            raise UserError(f"store {self.where}: google-cloud-storage is not installed; pip install 'metadiff[gcs]'") from None
        self._retry = DEFAULT_RETRY.with_delay(initial=0.2, maximum=10, multiplier=2)
        self._patience = {"retry": self._retry.with_timeout(_PATIENCE_SECONDS), "timeout": (_CONNECT_SECONDS, _ANSWER_SECONDS)}
        with self._explained():
            # The project matters only to who makes buckets.
            self._client = storage.Client(project="-", client_options={"api_endpoint": self.endpoint_url} if self.endpoint_url else None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from google.api_core import exceptions as answers
        from google.auth import exceptions as auth
        from google.cloud.storage import exceptions as storage
        from requests import exceptions as requests
        from urllib3 import exceptions as urllib3

        try:
            yield
        except UserError:
            raise
        except answers.GoogleAPICallError as error:
            raise self._refusal(error.code, error.message) from None
        except storage.InvalidResponse as error:
            raise self._refusal(error.response.status_code, error.args[0]) from None
        except (answers.RetryError, storage.DataCorruption, auth.TransportError, *_broken(requests), urllib3.HTTPError) as error:
            advice = "check the network, store.endpoint_url and STORAGE_EMULATOR_HOST; what is stored stays, start again to go on"
            raise StoreUnavailable(f"store {self.where}: {_line(error)}; {advice}") from None
        except auth.GoogleAuthError as error:
            raise UserError(f"store {self.where}: {_line(error).rstrip('.')}; {_ADVICE[401]}") from None
        except (requests.RequestException, ValueError) as error:
            raise UserError(f"store {self.where}: {_line(error)}; check store.endpoint_url and STORAGE_EMULATOR_HOST") from None

    def _refusal(self, status: int | None, message: str) -> UserError:
        said = f"{status} {' '.join(str(message).split())}"
        if status is None or status in _PASSING or status >= 500:
            return StoreUnavailable(f"store {self.where}: the service fails ({said}); start again later to go on")
        advice = _ADVICE.get(status, "check store.url and store.endpoint_url")
        return UserError(f"store {self.where}: refused ({said}); {advice}")


def _broken(requests: Any) -> tuple[type[Exception], ...]:
    return requests.ConnectionError, requests.Timeout, requests.ChunkedEncodingError


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
