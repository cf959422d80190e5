"""A run small enough for tests: six letters a split, 16 pixels, 20 denoising steps."""

from pathlib import Path

import yaml

TINY = {
    "run": {"name": "tiny"},
    "data": {"kind": "glyphs", "num_classes": 6, "images_per_class": 12},
    "prepare": {"image_size": 16},
    "pretrain": {"backbone": "conv4", "epochs": 2, "batch_size": 16, "learning_rate": 0.05, "precision": "fp32"},
    "episodes": {"way": 3, "shots": [1, 2], "query": 4},
    "targets": {"num_tasks": 50},
    "schedule": {"num_steps": 20},
    "train": {"iterations": 100, "batch_size": 4, "ema_decay": 0.9, "ema_start": 10, "checkpoint_every": 50},
    "evaluate": {"num_tasks": 8, "trace_tasks": 4, "gda_steps": 5},
}


def write_config(folder: Path, **sections: dict) -> Path:
    """The tiny configuration as a file in `folder`, with `run.dir` there and other sections replaced or merged by `sections`."""
    tree = {name: dict(options) for name, options in TINY.items()}
    tree["run"]["dir"] = str(folder / "runs")
    for name, options in sections.items():
        tree[name] = {**tree.get(name, {}), **options} if name != "data" else options
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
