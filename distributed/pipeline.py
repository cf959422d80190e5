"""All stages on the engine: `python -m distributed.pipeline [CONFIG] [key=value ...] [--dry-run] [--force]`."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from distributed import embed, evaluate, fit_targets, prepare, pretrain, train
from distributed.beton import import_ffcv, refuse_if_in_use
from distributed.blobs import open_blobs
from distributed.config import EngineConfig, load
from distributed.runtime import check_resources, connect, session
from metadiff import command, preflight, stages
from metadiff.parallel import Ranks
from metadiff.pipeline import Stage, artifact_path, pending

STAGES: dict[str, Stage] = {
    "prepare": prepare.STAGE,
    "pretrain": pretrain.STAGE,
    "embed": embed.STAGE,
    "fit_targets": fit_targets.STAGE,
    "train": train.STAGE,
    "evaluate": evaluate.STAGE,
    "report": stages.STAGES["report"],
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
    if settings.loader.kind == "ffcv" and running & {"prepare", "pretrain", "embed"}:
        import_ffcv()
    if running & {"pretrain", "embed", "fit_targets", "train", "evaluate"}:
        check_resources(settings.ray, settings.machine.device)
        if settings.ray.address and settings.ray.num_workers + settings.ray.num_actors:
            connect(settings.ray)
    if "fit_targets" in running and settings.store.url and "://" in settings.store.url:
        open_blobs(settings.store.url, settings.store.endpoint_url).prepare()
    for stage, size in (("pretrain", settings.pretrain.batch_size), ("train", settings.train.batch_size)):
        if stage in running:
            Ranks(0, max(1, settings.ray.num_workers)).share(size, f"{stage}.batch_size")


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
