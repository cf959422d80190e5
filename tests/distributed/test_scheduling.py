import random

import pytest

from distributed.scheduling import Dispatcher


def test_blocks_go_out_in_order_two_ahead() -> None:
    dispatcher = Dispatcher[str, int](range(5))
    assert [dispatcher.take("a"), dispatcher.take("a"), dispatcher.take("a")] == [0, 1, None]
    assert [dispatcher.take("b"), dispatcher.take("b"), dispatcher.take("b")] == [2, 3, None]
    dispatcher.done("a", 0)
    assert dispatcher.take("a") == 4
    assert dispatcher.held("a") == (1, 4)
    assert not dispatcher.drained


def test_how_far_ahead_is_a_setting() -> None:
    dispatcher = Dispatcher[str, int](range(5), ahead=1)
    assert [dispatcher.take("a"), dispatcher.take("a")] == [0, None]


def test_drained_when_all_are_finished() -> None:
    dispatcher = Dispatcher[str, int](range(2))
    dispatcher.take("a")
    dispatcher.take("a")
    dispatcher.done("a", 0)
    assert not dispatcher.drained
    dispatcher.done("a", 1)
    assert dispatcher.drained
    assert dispatcher.finished == {0, 1}
    assert dispatcher.take("a") is None


def test_nothing_to_do_is_drained_at_once() -> None:
    dispatcher = Dispatcher[str, int]([])
    assert dispatcher.drained
    assert not dispatcher.hopeless
    assert dispatcher.take("a") is None


def test_a_failed_block_is_next_again() -> None:
    dispatcher = Dispatcher[str, int](range(4))
    assert [dispatcher.take("a"), dispatcher.take("a")] == [0, 1]
    dispatcher.failed("a", 0, "broken")
    assert dispatcher.take("b") == 0
    assert not dispatcher.poisoned


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_block_is_given_up_after_its_attempts(attempts: int) -> None:
    dispatcher = Dispatcher[str, int]([7], attempts)
    for attempt in range(attempts):
        assert dispatcher.take("a") == 7
        dispatcher.failed("a", 7, f"error {attempt}")
    assert dispatcher.take("a") is None
    assert dispatcher.drained
    assert dispatcher.poisoned == {7: f"error {attempts - 1}"}


def test_what_a_lost_worker_held_is_next_again_in_the_same_order() -> None:
    dispatcher = Dispatcher[str, int](range(6))
    dispatcher.take("a")
    dispatcher.take("a")
    dispatcher.take("b")
    dispatcher.lost("a", "gone")
    assert dispatcher.held("a") == ()
    assert [dispatcher.take("b"), dispatcher.take("c"), dispatcher.take("c")] == [0, 1, 3]


def test_only_the_block_that_a_lost_worker_was_at_is_suspected() -> None:
    dispatcher = Dispatcher[str, int](range(2), losses=2)
    for _ in range(2):
        assert [dispatcher.take("a"), dispatcher.take("a")] == [0, 1]
        dispatcher.lost("a", "gone")
    assert dispatcher.poisoned == {0: "gone"}
    assert dispatcher.take("a") == 1
    dispatcher.lost("a", "gone")
    assert dispatcher.take("a") == 1


def test_losses_and_errors_are_counted_apart() -> None:
    dispatcher = Dispatcher[str, int]([0], attempts=2, losses=2)
    dispatcher.take("a")
    dispatcher.failed("a", 0, "error")
    dispatcher.take("a")
    dispatcher.lost("a", "gone")
    assert dispatcher.take("a") == 0
    assert not dispatcher.poisoned


def test_losing_a_worker_without_work_changes_nothing() -> None:
    dispatcher = Dispatcher[str, int](range(2))
    dispatcher.lost("a", "gone")
    dispatcher.take("a")
    dispatcher.done("a", 0)
    dispatcher.lost("a", "gone")
    assert dispatcher.take("b") == 1
    assert not dispatcher.poisoned


def test_hopeless_when_a_block_is_given_up_before_any_is_finished() -> None:
    dispatcher = Dispatcher[str, int](range(3), attempts=1)
    dispatcher.take("a")
    dispatcher.take("a")
    dispatcher.failed("a", 0, "error")
    assert dispatcher.hopeless
    dispatcher.done("a", 1)
    assert not dispatcher.hopeless


def test_no_two_blocks_alike() -> None:
    with pytest.raises(AssertionError, match="alike"):
        Dispatcher([1, 2, 1])


@pytest.mark.parametrize("seed", range(200))
def test_every_block_is_settled_whatever_happens(seed: int) -> None:
    """Workers that fail, die and finish at random: each block is finished or given up, never both, and never held twice."""
    rng = random.Random(seed)
    attempts, losses, ahead = rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 3)
    blocks, workers = range(rng.randint(1, 30)), range(rng.randint(1, 4))
    cursed = {block for block in blocks if rng.random() < 0.2}
    dispatcher = Dispatcher[int, int](blocks, attempts, losses, ahead)
    errors, deaths = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
    for _ in range(10_000):
        if dispatcher.drained:
            break
        worker = rng.choice(workers)
        while dispatcher.take(worker) is not None:
            pass
        held = [block for other in workers for block in dispatcher.held(other)]
        assert len(held) == len(set(held))
        assert all(len(dispatcher.held(other)) <= ahead for other in workers)
        assert not dispatcher.finished & {*held, *dispatcher.poisoned}
        if not dispatcher.held(worker):
            continue
        block = dispatcher.held(worker)[0]
        if rng.random() < 0.2:
            dispatcher.lost(worker, "gone")
            deaths[block] += 1
        elif block in cursed or rng.random() < 0.1:
            dispatcher.failed(worker, block, "error")
            errors[block] += 1
        else:
            dispatcher.done(worker, block)
    assert dispatcher.drained
    assert dispatcher.finished | set(dispatcher.poisoned) == set(blocks)
    assert not dispatcher.finished & set(dispatcher.poisoned)
    assert set(dispatcher.poisoned) == {block for block in blocks if errors[block] == attempts or deaths[block] == losses}
