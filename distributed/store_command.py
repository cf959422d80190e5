"""`python -m distributed.store`: what a store of targets holds, whether it is whole, and one array of it."""

import argparse
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NoReturn

from distributed.finalize import finalize
from distributed.finalized import MANIFEST
from distributed.shard import BadShard, DamagedShards
from distributed.store import TargetStore
from distributed.survey import Survey, survey
from metadiff.errors import DISK_TROUBLE, UserError
from metadiff.pipeline import flatten, say
from metadiff.targets import DTYPES

_WHOLE, _NOT_WHOLE, _BAD_INPUT, _INTERRUPTED = 0, 1, 2, 130
_FIT = "python -m distributed.fit_targets, with the configuration that it was made with"
_SHOWN = 20
_PROGRAM = "python -m distributed.store"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        return _ACTIONS[options.action](TargetStore.find(options.url, options.endpoint_url), options)
    except KeyboardInterrupt:
        say("interrupted; nothing is half done, start again")
        return _INTERRUPTED
    except DamagedShards as damage:
        say(f"error: {damage}; run {_FIT}")
        return _NOT_WHOLE
    except UserError as error:
        say(f"error: {' '.join(str(error).split())}")
        return _BAD_INPUT
    except OSError as error:
        if error.errno not in DISK_TROUBLE:
            raise
        say(f"error: store {error.filename}: {error.strerror}; make room, or ask for the permission, and start again")
        return _BAD_INPUT


def _stat(store: TargetStore, options: argparse.Namespace) -> int:
    found = survey(store)
    print("\n".join(_described(found)))
    return _judged(found, options, "whole, as far as sizes and headers tell")


def _verify(store: TargetStore, options: argparse.Namespace) -> int:
    found = survey(store, every_bit=True)
    print("\n".join(_described(found)))
    if options.delete_damaged and not found.whole:
        _delete_damaged(found)
    return _judged(found, options, "whole: every checksum matches")


def _finalize(store: TargetStore, options: argparse.Namespace) -> int:
    finalized = finalize(store, options.dtype)
    print(f"store {store.blobs.where}: finalized")
    for name, entry in finalized.files.items():
        print(f"  {name}  {_bytes(entry['bytes'])}  sha256 {entry['sha256']}")
    return _WHOLE


_ACTIONS: Mapping[str, Callable[[TargetStore, argparse.Namespace], int]] = {"stat": _stat, "verify": _verify, "finalize": _finalize}


def _described(found: Survey) -> list[str]:
    """The lines that say what is there."""
    store = found.store
    identity = {key: value for key, value in flatten(store.identity).items() if key not in ("format", "features")}
    made_with = " ".join(f"{key.removeprefix('config.')}={value}" for key, value in identity.items())
    there = store.num_blocks - len(found.missing)
    return [
        f"store {store.blobs.where}",
        textwrap.fill(made_with, 120, initial_indent="made with  ", subsequent_indent=" " * 11, break_long_words=False),
        f"features   {store.identity['features']}",
        f"tasks      {found.num_tasks:,} of {store.num_tasks:,}",
        f"blocks     {there - len(found.damaged):,} of {store.num_blocks:,}, {_bytes(found.num_bytes)}",
        f"missing    {_ranges(found.missing)}",
        f"damaged    {_ranges(sorted(found.damaged))}",
        *_some(f"  block {block} {fault}" for block, fault in found.damaged.items()),
        f"foreign    {len(found.foreign) or 'none'}",
        *_some(f"  {name}" for name in found.foreign),
        f"finalized  {_finalized(found)}",
        *[f"  {name} {fault}" for name, fault in found.damaged_arrays.items()],
    ]


def _judged(found: Survey, options: argparse.Namespace, praise: str) -> int:
    """The exit code, having said what to do."""
    again = f"{options.url} --endpoint-url {options.endpoint_url}" if options.endpoint_url else options.url
    if found.whole:
        print(praise)
    elif found.bad_blocks:
        deletes = found.damaged and not getattr(options, "delete_damaged", False)
        say(f"not whole: run {f'{_PROGRAM} verify --delete-damaged {again}, then ' if deletes else ''}{_FIT}")
    else:
        say(f"not whole: run {_PROGRAM} finalize {again}")
    return _WHOLE if found.whole else _NOT_WHOLE


def _delete_damaged(found: Survey) -> None:
    for block in found.damaged:
        try:
            # Somebody may have mended it meanwhile.
            found.store.unpacked(block)
        except BadShard:
            found.store.discard(block)
    if found.damaged_arrays:
        found.store.blobs.delete(MANIFEST)
    what = [f"{len(found.damaged)} damaged shards"] * bool(found.damaged) + [MANIFEST] * bool(found.damaged_arrays)
    say(f"deleted: {', '.join(what) or 'nothing'}")


def _finalized(found: Survey) -> str:
    if found.finalized is None:
        return "no"
    return f"{found.finalized.manifest['dtype']}, {_bytes(sum(entry['bytes'] for entry in found.finalized.files.values()))}"


def _some(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    return every[:_SHOWN] + ([f"  and {len(every) - _SHOWN} more"] if len(every) > _SHOWN else [])


def _ranges(blocks: Sequence[int]) -> str:
    """Such as "3 blocks: 0, 7-8"."""
    runs = [[block for _, block in run] for _, run in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0])]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs[:_SHOWN]]
    more = [f"and {len(runs) - _SHOWN} more ranges"] if len(runs) > _SHOWN else []
    return f"{len(blocks)} block{'s' if len(blocks) > 1 else ''}: {', '.join(shown + more)}" if blocks else "none"


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number:.0f} bytes"
        number /= 1000
    return f"{number:.3g} TB"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    codes = "Exit codes: 0 whole, 1 incomplete or damaged (it says what to run), 2 bad input, 130 interrupted."
    parser = _Parser(_PROGRAM, description="Look after a store of fitted targets. Nothing but the store is needed.", epilog=codes)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{stat,verify,finalize}")
    stat = actions.add_parser("stat", help="what it is and how much of it is there, from sizes and headers", epilog=codes)
    verify = actions.add_parser("verify", help="read it all and compare every checksum", epilog=codes)
    verify.add_argument("--delete-damaged", action="store_true", help="remove damaged shards, so that the next fit makes them again")
    final = actions.add_parser("finalize", help="make one memory-mappable array of a complete store, beside its shards", epilog=codes)
    final.add_argument("--dtype", choices=DTYPES, help="of the array; as the targets were fitted unless given")
    for action in (stat, verify, final):
        action.add_argument("url", metavar="URL", help="a folder, s3://bucket/prefix or gs://bucket/prefix")
        action.add_argument("--endpoint-url", help="of a service other than Amazon's or Google's own")
    return parser
