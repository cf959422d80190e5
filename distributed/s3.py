"""Files in an S3 bucket, or in a service that speaks the same protocol. Needs boto3, which finds credentials and region as ever."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from distributed.blobs import StoreUnavailable
from metadiff.errors import UserError

_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "InvalidClientTokenId", "AuthFailure"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_ADVICE = {
    "NoSuchBucket": "create the bucket, or set store.url to one that there is",
    "AccessDenied": "these credentials need s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject there",
    "RequestTimeTooSkewed": "set this machine's clock",
    **dict.fromkeys(_CREDENTIALS, "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
    **dict.fromkeys(_REGION, "set AWS_DEFAULT_REGION to the bucket's region"),
}
_PASSING = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_NOT_FOUND, _CONFLICT, _PRECONDITION_FAILED = 404, 409, 412
_TRIES = 6
_PART_BYTES, _MOST_PARTS = 16 * 2**20, 10_000
"""What S3 takes: parts of 5 MiB and more, and no more than so many."""


class S3Blobs:
    """The objects directly under a prefix of a bucket. See `distributed.blobs.Blobs`."""

    def __init__(self, bucket: str, prefix: str, endpoint_url: str | None) -> None:
        self.bucket, self.prefix, self.endpoint_url = bucket, prefix, endpoint_url
        self.where = f"s3://{bucket}/{prefix}"
        self._patient, self._quick = self._connect()

    def __reduce__(self) -> tuple[type["S3Blobs"], tuple[str, str, str | None]]:
        return S3Blobs, (self.bucket, self.prefix, self.endpoint_url)

    def prepare(self) -> None:
        """See `Blobs`: one quick request, so that a wrong address or key is told in seconds."""
        with self._explained():
            self._quick.list_objects_v2(Bucket=self.bucket, Prefix=self._key(""), MaxKeys=1)

    def probe(self) -> None:
        """See `Blobs`."""
        self.prepare()

    def get(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """See `Blobs`."""
        from botocore.exceptions import ClientError

        span = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if start or stop is not None else {}
        with self._explained():
            try:
                return self._download(name, span)
            except ClientError as error:
                if error.response["Error"]["Code"] == "NoSuchKey":
                    return None
                if error.response["Error"]["Code"] == "InvalidRange":  # nothing there
                    return b""
                raise

    def size(self, name: str) -> int | None:
        """See `Blobs`."""
        from botocore.exceptions import ClientError

        with self._explained():
            try:
                return self._patient.head_object(Bucket=self.bucket, Key=self._key(name))["ContentLength"]
            except ClientError as error:
                if _status(error.response) == _NOT_FOUND:
                    return None
                raise

    def put_new(self, name: str, content: bytes) -> bool:
        """See `Blobs`. A request that is repeated because its answer was lost finds its own object there, and says False."""
        from botocore.exceptions import ClientError

        with self._explained():
            for attempt in range(_TRIES):
                try:
                    self._patient.put_object(Bucket=self.bucket, Key=self._key(name), Body=content, IfNoneMatch="*")
                    return True
                except ClientError as error:
                    status = _status(error.response)
                    if status == _PRECONDITION_FAILED:
                        return False
                    # S3 cannot tell yet which of several writers is first.
                    if status != _CONFLICT or attempt == _TRIES - 1:
                        raise
                    time.sleep(0.1 * 2**attempt)
        raise AssertionError

    def put(self, name: str, content: bytes) -> None:
        """See `Blobs`."""
        with self._explained():
            self._patient.put_object(Bucket=self.bucket, Key=self._key(name), Body=content)

    @contextmanager
    def writing(self, name: str, size: int) -> Iterator[Callable[[bytes], object]]:
        """See `Blobs`: an upload in parts. What a killed one leaves is invisible, but paid for until the bucket's lifecycle removes it."""
        with self._explained():
            part_bytes = max(_PART_BYTES, math.ceil(size / _MOST_PARTS))
            upload = _Upload(self._patient, {"Bucket": self.bucket, "Key": self._key(name)}, part_bytes)

        def write(piece: bytes) -> None:
            with self._explained():
                upload.write(piece)

        try:
            yield write
            with self._explained():
                upload.complete(size)
        except BaseException:
            upload.abort()
            raise

    def sizes(self) -> dict[str, int]:
        """See `Blobs`."""
        with self._explained():
            pages = self._patient.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(""), Delimiter="/")
            return {item["Key"].removeprefix(self._key("")): item["Size"] for page in pages for item in page.get("Contents", ())}

    def delete(self, name: str) -> None:
        """See `Blobs`."""
        with self._explained():
            self._patient.delete_object(Bucket=self.bucket, Key=self._key(name))

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _download(self, name: str, span: Mapping[str, str]) -> bytes:
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        for attempt in range(_TRIES):
            body = self._patient.get_object(Bucket=self.bucket, Key=self._key(name), **span)["Body"]
            try:
                return body.read()
            # boto3 repeats a request, but not the reading of its answer.
            except (HTTPClientError, IncompleteReadError):
                if attempt == _TRIES - 1:
                    raise
        raise AssertionError

    def _connect(self) -> tuple[Any, Any]:
        """The client for the work, which outlasts short failures, and one that soon gives up."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise UserError(f"store {self.where}: boto3 is not installed; pip install 'metadiff[s3]'") from None
        with self._explained():
            # A session of its own: the default one is not for several threads.
            session = boto3.Session()
            patient = Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": _TRIES})
            quick = Config(connect_timeout=5, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 2})
            first, second = (session.client("s3", endpoint_url=self.endpoint_url, config=config) for config in (patient, quick))
        return first, second

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from botocore import exceptions

        try:
            yield
        except UserError:
            raise
        except exceptions.ClientError as error:
            raise self._refusal(error.response) from None
        except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError) as error:
            advice = "check the network, store.endpoint_url and AWS_ENDPOINT_URL; what is stored stays, start again to go on"
            raise StoreUnavailable(f"store {self.where}: {error}; {advice}") from None
        except (exceptions.BotoCoreError, ValueError) as error:
            raise UserError(f"store {self.where}: {' '.join(str(error).split())}; check AWS_* variables and store.endpoint_url") from None

    def _refusal(self, response: Mapping[str, Any]) -> UserError:
        code, message = (response["Error"].get(key, "") for key in ("Code", "Message"))
        if code in _PASSING or _status(response) >= 500:
            return StoreUnavailable(f"store {self.where}: the service fails ({code} {message}); start again later to go on")
        advice = _ADVICE.get(code, "check store.url and store.endpoint_url")
        return UserError(f"store {self.where}: refused ({code}: {message}); {advice}")


class _Upload:
    """An object on its way in parts: in place when it is completed, one part of it in memory."""

    def __init__(self, client: Any, place: Mapping[str, str], part_bytes: int) -> None:
        self.client, self.part_bytes = client, part_bytes
        self.place = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
        self.parts: list[dict[str, Any]] = []
        self.waiting, self.size = bytearray(), 0

    def write(self, piece: bytes) -> None:
        self.waiting += piece
        while len(self.waiting) >= self.part_bytes:
            self._send(self.part_bytes)

    def complete(self, size: int) -> None:
        from botocore.exceptions import ClientError

        if self.waiting or not self.parts:
            self._send(len(self.waiting))
        assert self.size == size, f"{self.place['Key']}: {self.size} bytes written, {size} announced"
        try:
            self.client.complete_multipart_upload(**self.place, MultipartUpload={"Parts": self.parts})
        except ClientError as error:
            # A request that is repeated because its answer was lost finds its upload gone, and its object there.
            if error.response["Error"]["Code"] != "NoSuchUpload" or not self._is_there():
                raise

    def _is_there(self) -> bool:
        place = {key: self.place[key] for key in ("Bucket", "Key")}
        return self.client.head_object(**place)["ContentLength"] == self.size

    def abort(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        with suppress(BotoCoreError, ClientError):
            self.client.abort_multipart_upload(**self.place)

    def _send(self, num_bytes: int) -> None:
        number, part = len(self.parts) + 1, bytes(self.waiting[:num_bytes])
        answer = self.client.upload_part(**self.place, PartNumber=number, Body=part)
        checksums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name != "ChecksumType"}
        self.parts.append({"PartNumber": number, "ETag": answer["ETag"], **checksums})
        self.size += num_bytes
        del self.waiting[:num_bytes]


def _status(response: Mapping[str, Any]) -> int:
    return response["ResponseMetadata"]["HTTPStatusCode"]
