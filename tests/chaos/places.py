"""Where the stores under test lie, seen past the code that writes them."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_SHARD = re.compile(r"block-(\d{8})\.safetensors")


def shard_name(block: int) -> str:
    return f"block-{block:08d}.safetensors"


class Place(Protocol):
    """A folder or a prefix in a bucket."""

    @property
    def options(self) -> list[str]:
        """What the command line says of it."""
        ...

    def names(self) -> Collection[str]:
        """The files that readers see."""
        ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes) -> None: ...


def blocks(place: Place) -> set[int]:
    """The blocks that are there."""
    return {int(found[1]) for found in map(_SHARD.fullmatch, place.names()) if found}


def contents(place: Place) -> dict[str, bytes]:
    """All files with their bytes."""
    return {name: place.read(name) for name in place.names()}


@dataclass(frozen=True)
class Folder:
    path: Path

    @property
    def options(self) -> list[str]:
        return [f"store.url={self.path}"]

    def names(self) -> Collection[str]:
        return {path.name for path in self.path.glob("*") if path.suffix != ".tmp"}

    def left_over(self) -> list[Path]:
        """What writers have not committed, or not yet."""
        return list(self.path.glob("*.tmp"))

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content)


@dataclass(frozen=True)
class Bucket:
    """A prefix in a bucket: the command goes through `endpoint_url`, this object's own requests through `client`."""

    client: Any
    bucket: str
    prefix: str
    endpoint_url: str

    @property
    def options(self) -> list[str]:
        return [f"store.url=s3://{self.bucket}/{self.prefix}", f"store.endpoint_url={self.endpoint_url}"]

    def names(self) -> Collection[str]:
        listed = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/")
        return {item["Key"].removeprefix(f"{self.prefix}/") for item in listed.get("Contents", ())}

    def read(self, name: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=content)
