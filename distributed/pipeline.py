"""All stages on the engine: `python -m distributed.pipeline [CONFIG] [key=value ...] [--dry-run] [--force]`."""

import importlib.util
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from distributed import embed, evaluate, fit_targets, prepare, pretrain, report, train
from distributed.beton import import_ffcv, refuse_if_in_use
from distributed.blobs import open_blobs
from distributed.config import EngineConfig, load
from distributed.resources import check_resources
from distributed.runtime import connect, session
from distributed.store import StoreConfig
from metadiff import command, preflight
from metadiff.errors import UserError
from metadiff.parallel import Ranks
from metadiff.pipeline import Stage, artifact_path, pending

STAGES: dict[str, Stage] = {
    "prepare": prepare.STAGE,
    "pretrain": pretrain.STAGE,
    "embed": embed.STAGE,
    "fit_targets": fit_targets.STAGE,
    "train": train.STAGE,
    "evaluate": evaluate.STAGE,
    "report": report.STAGE,
}


def check(settings: EngineConfig, wanted: Collection[str], forced: Collection[str] = ()) -> None:
    """Refuse, before anything is written, what would fail later: of the method and of the engine.

    Raises:
        UserError: the first thing found.
    """
    preflight.check(settings, wanted, forced)
    running = set(pending(settings, STAGES, list(wanted)[-1], frozenset(forced)))
    if "prepare" in running:
        refuse_if_in_use(artifact_path(settings, "prepare", STAGES["prepare"]))
    on_images = {"prepare", "pretrain", "embed", *(["train"] if settings.train.source == "images" else [])}
    if settings.loader.kind == "ffcv" and running & on_images:
        import_ffcv()
    if running & {"pretrain", "train"}:
        _refuse_absent("tensorboard", "TensorBoard")
    if running & {"pretrain", "embed", "fit_targets", "train", "evaluate"}:
        if settings.ray.most:
            _refuse_absent("ray", "Ray")
        check_resources(settings.ray, settings.machine.device)
        if settings.ray.address and settings.ray.most:
            connect(settings.ray)
    if "fit_targets" in running and settings.store.url:
        _refuse_unusable(settings.store)
    fewest, most = settings.ray.workers
    if "pretrain" in running:
        Ranks(0, max(1, fewest)).share(settings.pretrain.batch_size, "pretrain.batch_size")
    if "train" in running:
        Ranks(0, max(1, most), elastic=fewest < most).share(settings.train.batch_size, "train.batch_size")


def _refuse_absent(module: str, name: str) -> None:
    # Not imported: Ray reads its settings then.
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{name} is not installed; pip install 'metadiff[ray]', or use `python -m metadiff`, which needs none")


def _refuse_unusable(store: StoreConfig) -> None:
    assert store.url
    blobs = open_blobs(store.url, store.endpoint_url)
    if "://" in store.url:
        return blobs.prepare()
    there = next(path for path in (Path(store.url), *Path(store.url).parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"store.url={store.url}: {there} is no folder that you may write to; choose another")


PROGRAM = command.Program(
    "python -m distributed",
    "MetaDiff on Ray and FFCV.",
    STAGES,
    load,
    check,
    default_config=Path(__file__).parents[1] / "configs" / "glyphs.yaml",
    session=session,
)


def main(arguments: Sequence[str] | None = None, stage: str = "pipeline") -> int:
    """Run the command line of one stage, or of all; returns the exit code."""
    return command.run(PROGRAM, arguments, stage)


if __name__ == "__main__":
    sys.exit(main())
