"""Typed configuration: defaults, then one YAML file, then `key=value` overrides."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from metadiff.errors import UserError

T = TypeVar("T")
Tree = dict[str, Any]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a configuration section: frozen, keyword-only, validated, closed to unknown keys."""
    strict = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
    return dataclass(cls, frozen=True, kw_only=True, slots=True, config=strict)  # type: ignore[return-value]


def load(
    cls: type[T],
    path: str | Path,
    overrides: Iterable[str] = (),
    underlay: Callable[[Tree], Tree] | None = None,
    ignored: Iterable[str] = (),
) -> T:
    """Read the YAML file at `path`, apply `key.subkey=value` overrides, and validate it all as `cls`.

    `underlay` maps what the user wrote to the defaults that lie beneath it (a preset's options). Sections in `ignored` are left out.

    Raises:
        UserError: the file is missing or is not YAML, or a key or value is wrong; the message names the nearest key.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    tree = {section: options for section, options in tree.items() if section not in ignored}
    return validate(cls, merge(underlay(tree), tree) if underlay else tree, str(path))


def dump(section: Any) -> Tree:
    """The resolved section as plain YAML- and JSON-ready values."""
    return TypeAdapter(type(section)).dump_python(section, mode="json")


def merge(below: Tree, above: Tree) -> Tree:
    """`above` laid over `below`, section by section."""
    shared = [key for key in below if isinstance(below[key], dict) and isinstance(above.get(key), dict)]
    return {**below, **above, **{key: merge(below[key], above[key]) for key in shared}}


def read_yaml(path: Path) -> Tree:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, or not a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config {path}: no such file; the shipped ones are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read ({error})") from None
    # A ValueError: PyYAML's, for a scalar that only looks like a date or a number.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: expected a mapping of sections at the top, found {type(tree).__name__}")
    return tree


def validate(cls: type[T], tree: Tree, where: str) -> T:
    """`tree` as an instance of the section `cls`; `where` names its origin in errors.

    Raises:
        UserError: with the first offending key.
    """
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        raise UserError(f"config {where}: {_explain(cls, error.errors(include_url=False))}") from None


def _apply_override(tree: Tree, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"override {override!r}: expected key.subkey=value, for example train.batch_size=64")
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.setdefault(parent, {}), dict):
            tree[parent] = {}
        tree = tree[parent]
    try:
        tree[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {override!r}: the value is not valid YAML; quote it, as in {key}='\"text\"'") from None


def _explain(cls: type, errors: list[Any]) -> str:
    """The first of pydantic's errors, typing mistakes before their consequences: key, value, what is allowed, nearest key."""
    error = next((e for e in errors if e["type"] == "unexpected_keyword_argument"), errors[0])
    *parents, last = [str(part) for part in error["loc"]] or [""]
    sections, written = _sections_at(cls, parents)
    key = ".".join([*written, last])
    if error["type"] == "unexpected_keyword_argument":
        known = sorted({field.name for section in sections for field in dataclasses.fields(section)})
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown key {key!r}{hint} (known here: {', '.join(known)})"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"].startswith(("missing", "union_tag", "dataclass")) or isinstance(error["input"], dict):
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}={error['input']!r}: {message}"


def _sections_at(cls: type, path: list[str]) -> tuple[list[type], list[str]]:
    """The sections that `path` leads to, and the path as the user writes it (without the tags of unions)."""
    sections, written = [cls], []
    for part in path:
        tagged = [section for section in sections if _tag(section) == part]
        if not tagged:
            written.append(part)
        hints = [typing.get_type_hints(section).get(part) for section in sections]
        sections = tagged or [inner for hint in hints for inner in _sections_of(hint)]
    return sections, written


def _sections_of(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [section for arg in typing.get_args(hint) for section in _sections_of(arg)]


def _tag(cls: type) -> str | None:
    kind = typing.get_type_hints(cls).get("kind")
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Literal else None
