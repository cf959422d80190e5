"""Checkpoints as one safetensors file: tensors by name, everything else as JSON in its header. Loading runs no code."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from metadiff.artifact import write_atomically
from metadiff.errors import UserError

_TENSOR = "__tensor__"


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain values to `path`, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _split(state, "", tensors)
    write_atomically(path, save(tensors, metadata={"state": json.dumps(skeleton)}))


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote.

    Raises:
        UserError: the file is truncated or not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads(file.metadata()["state"])
            return _join(skeleton, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"checkpoint {path}: no such file") from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {path}: truncated or damaged ({error}); delete it, or redo the stage with --force") from None


def _split(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        assert name not in tensors, f"two tensors would be named {name}"
        # A copy, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        # JSON keys are strings; the pairs keep an optimizer's integer keys what they are.
        return {"dict": [[key, _split(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(skeleton: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(skeleton, list):
        return [_join(item, tensors) for item in skeleton]
    if isinstance(skeleton, dict):
        if _TENSOR in skeleton:
            return tensors[skeleton[_TENSOR]]
        return {key: _join(item, tensors) for key, item in skeleton["dict"]}
    return skeleton
