"""The named option sets: what lies beneath a configuration, by its `denoiser.preset`.

`paper` is MetaDiff (AAAI 2024) as printed and `official` the authors' code; both keep features as the backbone gives them. `stable` is
`official` with gain 1 on small features, the method made to work. `consistent` goes beyond the paper: see `metadiff.denoiser.Denoiser`.
"""

from copy import deepcopy
from typing import Any

from metadiff import denoiser

Tree = dict[str, Any]

_RAW_FEATURES = {"power": 1.0, "centre": False, "l2": False, "std": None}
# At large t, w_t is unit noise and c in g = a (w_t - c) only contaminates what is to be predicted: features must be small beside 1.
_SMALL_FEATURES = {"power": 1.0, "centre": True, "l2": True, "std": 0.1}

# "Training Details": Adam, 30 epochs of 10000 iterations. The batch of 8 tasks is that of the authors' code.
_PAPER_TRAINING = {
    "learning_rate": 1e-4,
    "weight_decay": 5e-4,
    "iterations": 300_000,
    "batch_size": 8,
    "loss_weighting": "eps",
    "ema_decay": None,
    "ema_start": 0,
}
# As many tasks as a small machine sees in minutes. An average over 1 / (1 - 0.9999) = 10,000 iterations would never leave the
# weights of iteration 2000 in such a run; one over 1000, from 500 on, has forgotten where it began.
_SHORT_TRAINING = {**_PAPER_TRAINING, "iterations": 3000, "batch_size": 128, "ema_decay": 0.999, "ema_start": 500}

_TARGETS = {"kind": "mean"}

PRESETS: dict[str, Tree] = {
    "paper": {"features": _RAW_FEATURES, "targets": _TARGETS, "train": _PAPER_TRAINING},
    "official": {"features": _RAW_FEATURES, "targets": _TARGETS, "train": {**_PAPER_TRAINING, "ema_decay": 0.9999, "ema_start": 2000}},
    "stable": {"features": _SMALL_FEATURES, "targets": _TARGETS, "train": _SHORT_TRAINING},
    "consistent": {"features": _SMALL_FEATURES, "targets": _TARGETS, "train": _SHORT_TRAINING},
}
for _name, _sections in PRESETS.items():
    _sections["denoiser"] = {"preset": _name, **denoiser.PRESETS[_name]}


def underlay(tree: Tree) -> Tree:
    """The options of the preset that `tree["denoiser"]["preset"]` names, `stable` if it names none; for `config.load`.

    What is no preset at all gets nothing: validation then says what is wrong.
    """
    section = tree.get("denoiser", {})
    name = section.get("preset", "stable") if isinstance(section, dict) else None
    return deepcopy(PRESETS.get(name, {})) if isinstance(name, str) else {}
