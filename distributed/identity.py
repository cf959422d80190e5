"""Whose a store is: a file in it with all that its targets depend on."""

import json
from collections.abc import Mapping
from typing import Any

from distributed.blobs import Blobs
from metadiff.artifact import digest
from metadiff.errors import UserError

FORMAT = 1
IDENTITY = "store.json"

# What is no option by its own name.
_SETTINGS = {"threads": "ray.cpus_per_worker (without Ray, machine.num_threads)", "device": "ray.gpus_per_worker or machine.device"}


def with_format(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """The identity in JSON values, as it is read back, with the format of stores that this version makes."""
    return json.loads(json.dumps({"format": FORMAT, **identity}))


def claim(blobs: Blobs, identity: Mapping[str, Any]) -> None:
    """Write the identity where there is none, and refuse another.

    Raises:
        UserError: the place is another's, or its file damaged.
    """
    if blobs.get(IDENTITY) is None:
        blobs.put_new(IDENTITY, json.dumps({"identity": identity, "checksum": digest(identity)}, indent=1).encode())
    _refuse_other(blobs.where, _parse(blobs.get(IDENTITY) or b"", blobs.where), identity)


def read_identity(blobs: Blobs) -> Mapping[str, Any]:
    """The identity in a place.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """
    content = blobs.get(IDENTITY)
    if content is None:
        advice = "check the URL; where there are shards, start their fit again, which writes that file anew"
        raise UserError(f"store {blobs.where}: there is none (no {IDENTITY}); {advice}")
    return _parse(content, blobs.where)


def _refuse_other(where: str, there: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    # Here: it brings all stages along, and actors should start fast.
    from metadiff.pipeline import flatten

    old, new = flatten(there), flatten(ours)
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more keys differ)" if len(changed) > 1 else ""
        again = f"set {_SETTINGS[key]} as then, " if key in _SETTINGS else ""
        made = f"made with {key}={old.get(key)!r}, this configuration says {new.get(key)!r}{more}"
        raise UserError(f"store {where}: {made}; {again}choose another store.url, or delete that store")


def _parse(content: bytes, where: str) -> Mapping[str, Any]:
    try:
        found = json.loads(content)
        intact = digest(found["identity"]) == found["checksum"]
    except (ValueError, KeyError, TypeError):
        found, intact = {}, False
    if not intact:
        advice = "if the store is this configuration's, delete that file: every shard says whose it is; else delete the store"
        raise UserError(f"store {where}: {IDENTITY} was edited or is damaged; {advice}")
    made = found["identity"].get("format")
    if made != FORMAT:
        advice = "use the version that made it, or choose another store.url"
        raise UserError(f"store {where}: has format {made}, this version reads format {FORMAT}; {advice}")
    return found["identity"]
