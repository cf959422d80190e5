"""What a fit leaves beside its artifact."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distributed.fitting import Order
from distributed.progress import Progress, spans
from distributed.tally import GivenUp, Tally
from metadiff.errors import Unfinished, UserError

FOUR_BLOCKS_OF_TEN_TASKS = cast(
    Order, SimpleNamespace(targets=SimpleNamespace(num_tasks=10), tasks=lambda block: range(3 * block, 3 * block + 3)[: 10 - 3 * block])
)


def record(progress: Progress) -> dict[str, Any]:
    return json.loads(progress.file.read_text())


@pytest.fixture
def progress(tmp_path: Path) -> Progress:
    """Block 0 is there already."""
    return Progress(tmp_path / "stable.summary.json", FOUR_BLOCKS_OF_TEN_TASKS, [1, 2, 3])


def test_all_that_was_missing_is_fitted_or_was_by_another(progress: Progress) -> None:
    with progress.recorded():
        progress.done(2, is_ours=True)
        progress.done(3, is_ours=False)
        progress.done(1, is_ours=True)
    assert [record(progress)[name] for name in ("tasks", "fitted", "skipped", "missing")] == [10, 6, 1, 0]


def test_a_damaged_block_is_missing_again(progress: Progress) -> None:
    with progress.recorded():
        progress.undo([0])
    assert record(progress)["missing"] == 10


def test_what_several_rounds_of_work_came_to(progress: Progress) -> None:
    first, second = Tally(alive=2, most=3, retries=1), Tally(alive=1, most=1, losses=2)
    with progress.recorded():
        for tally in (first, first, second):
            progress.watch(tally)
        second.retries = 4
    assert [record(progress)[name] for name in ("actors", "retries", "losses", "copies")] == [3, 5, 2, 0]


def test_blocks_given_up_are_recorded_with_their_tasks(progress: Progress) -> None:
    progress.done(2, is_ours=True)
    told = r"^fit_targets: 4 of 10 tasks are missing: blocks 1, 3 failed too often \(OSError: x\); see .*json;"
    with pytest.raises(Unfinished, match=told), progress.recorded():
        raise GivenUp({3: "lost", 1: "Traceback ...\nOSError: x"})
    first, second = record(progress)["poisoned"]
    assert first == {"block": 1, "first": 3, "last": 5, "error": "OSError: x", "traceback": "Traceback ...\nOSError: x"}
    assert (second["first"], second["last"], second["error"]) == (9, 9, "lost")


def test_input_that_is_refused_leaves_nothing(progress: Progress) -> None:
    with pytest.raises(UserError) as caught, progress.recorded():
        raise UserError("features.std=0: no")
    assert not caught.value.work_kept
    assert not progress.file.exists()


def test_a_refusal_after_work_keeps_it(progress: Progress) -> None:
    progress.done(1, is_ours=True)
    with pytest.raises(UserError) as caught, progress.recorded():
        raise UserError("store: full")
    assert caught.value.work_kept
    assert record(progress)["missing"] == 4


def test_an_interrupt_is_recorded(progress: Progress) -> None:
    with pytest.raises(KeyboardInterrupt), progress.recorded():
        raise KeyboardInterrupt
    assert record(progress)["missing"] == 7


@pytest.mark.parametrize(
    ("blocks", "shown"),
    [([3], "3"), ([2, 0, 1], "0-2"), ([5, 1, 2, 9], "1-2, 5, 9"), ([0, 2, 4, 6, 8, 10, 12], "0, 2, 4, 6, 8, ...")],
)
def test_spans(blocks: list[int], shown: str) -> None:
    assert spans(blocks) == shown
