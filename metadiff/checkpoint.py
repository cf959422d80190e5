"""Checkpoints as one safetensors file: tensors by name, everything else as JSON in its header. Loading runs no code."""

import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from metadiff.artifact import sha256, write_atomically
from metadiff.errors import UserError
from metadiff.parallel import ALONE, Ranks

_TENSOR = "__tensor__"
_BESIDE = "beside"


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


class Superseded(RuntimeError):
    """A newer attempt at the same training has begun, so that this one must not write any more."""


class Checkpoints:
    """The newest two states of one training, and which attempt at it may write.

    `<name>-<step>.safetensors` counts only with its marker `<name>-<step>.json`, which holds its size and checksum and is written last.
    `<name>.attempt` names the attempt that began last: an older one that is still running (its starter was killed, say) stops as soon as
    it would write. Rank 0 alone writes; what to resume from is its decision.

    Attributes:
        beside: plain values that `save` keeps beside the state, and that `resume` brings back.
    """

    def __init__(self, folder: Path, name: str, ranks: Ranks = ALONE) -> None:
        self._folder, self._name, self._ranks = folder, name, ranks
        self._attempt = uuid.uuid4().hex
        self.beside: dict[str, float] = {}

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Begin this attempt: the step and the state of the newest checkpoint that holds, on every rank; (0, {}) where there is none."""
        step = self._ranks.agree(self._begin() if self._ranks.first else 0)
        state = load_state(self._file(step)) if step else {}
        self.beside = state.pop(_BESIDE, {})
        return step, state

    def writable(self) -> bool:
        """Whether the training's files are this process's to write, as only rank 0's are; to be asked right before each write.

        Raises:
            Superseded: they were, until a newer attempt began.
        """
        if not self._ranks.first:
            return False
        token = self._token()
        try:
            newest = token.read_text()
        except FileNotFoundError:
            newest = "one that has finished"
        if newest != self._attempt:
            raise Superseded(f"{self._folder / self._name}: attempt {self._attempt} at this training gives way to a newer one ({newest})")
        return True

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` after `step` > 0, and the one before it."""
        if not self.writable():
            return
        file = self._file(step)
        save_state(file, {**state, _BESIDE: self.beside})
        marker = {"step": step, "bytes": file.stat().st_size, "sha256": sha256(file)}
        write_atomically(file.with_suffix(".json"), json.dumps(marker).encode())
        steps = self._steps()
        # Later steps are damaged: a state that holds would have been resumed from.
        for other in steps - {step, max((earlier for earlier in steps if earlier < step), default=step)}:
            self._remove(other)

    def clear(self) -> None:
        """Leave nothing of them: the training is done."""
        if self._ranks.first:
            for step in self._steps():
                self._remove(step)
            self._token().unlink(missing_ok=True)
        self._ranks.barrier()

    def _begin(self) -> int:
        write_atomically(self._token(), self._attempt.encode())
        steps = sorted(self._steps(), reverse=True)
        newest = next((step for step in steps if self._holds(step)), 0)
        if steps and newest != steps[0]:
            instead = f"goes on from step {newest}, the newest that holds" if newest else "starts afresh, for none holds"
            print(f"checkpoint {self._file(steps[0])}: unfinished or damaged; {instead}", file=sys.stderr, flush=True)
        return newest

    def _holds(self, step: int) -> bool:
        file = self._file(step)
        try:
            marker = json.loads(file.with_suffix(".json").read_text())
            return marker == {"step": step, "bytes": file.stat().st_size, "sha256": sha256(file)}
        except (OSError, ValueError):
            return False

    def _steps(self) -> set[int]:
        """The steps of all checkpoints there are, whole or not."""
        matches = (re.fullmatch(rf"{re.escape(self._name)}-(\d+)\.(safetensors|json)", path.name) for path in self._folder.iterdir())
        return {int(match[1]) for match in matches if match}

    def _remove(self, step: int) -> None:
        # The marker first, so that what is left after a kill does not count.
        for suffix in (".json", ".safetensors"):
            self._file(step).with_suffix(suffix).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"{self._name}-{step}.safetensors"

    def _token(self) -> Path:
        return self._folder / f"{self._name}.attempt"


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
