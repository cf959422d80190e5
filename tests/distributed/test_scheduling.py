import math
from collections.abc import Iterable

import pytest

from distributed.holdings import RecentMedian
from distributed.scheduling import Dispatcher


def crewed(blocks: Iterable[int], workers: str = "a", ahead: int = 2, **policy: float) -> Dispatcher[str, int]:
    """A dispatcher that workers named by one letter each have joined at 0."""
    dispatcher = Dispatcher[str, int](blocks, ahead=ahead, **policy)  # type: ignore[arg-type]
    for worker in workers:
        dispatcher.joined(worker, 0)
    return dispatcher


def finished_in_turn(dispatcher: Dispatcher[str, int], worker: str, times: Iterable[float]) -> None:
    """Let a worker finish the block it is at at each of these times, and feed everybody."""
    for now in times:
        assert dispatcher.done(worker, dispatcher.held(worker)[0], now)
        dispatcher.assignments(now)


# Whom to feed


def test_one_block_for_each_then_ahead_while_there_is_one_for_everybody() -> None:
    dispatcher = crewed(range(7), "ab")
    assert dispatcher.assignments(0) == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    assert dispatcher.assignments(0) == []
    assert dispatcher.done("b", 1, 1)
    assert dispatcher.assignments(1) == [("b", 4)]
    assert dispatcher.done("a", 0, 2)
    assert dispatcher.assignments(2) == []
    assert (dispatcher.held("a"), dispatcher.held("b"), dispatcher.held("c")) == ((2,), (3, 4), ())


def test_a_worker_is_fed_when_it_has_joined() -> None:
    dispatcher = Dispatcher[str, int](range(9))
    assert dispatcher.assignments(0) == []
    dispatcher.joined("a", 5)
    assert dispatcher.assignments(5) == [("a", 0)]
    dispatcher.joined("b", 6)
    assert dispatcher.assignments(6) == [("b", 1)]
    with pytest.raises(AssertionError, match="once"):
        dispatcher.joined("a", 7)


@pytest.mark.parametrize(("ahead", "given"), [(1, [0]), (2, [0, 1]), (4, [0, 1, 2, 3])])
def test_how_far_ahead_is_a_setting(ahead: int, given: list[int]) -> None:
    assert crewed(range(9), ahead=ahead).assignments(0) == [("a", block) for block in given]


def test_ahead_is_dealt_in_turns() -> None:
    assert crewed(range(9), "ab", ahead=3).assignments(0) == [(worker, block) for block, worker in enumerate("ababab")]


def test_drained_when_all_are_finished() -> None:
    dispatcher = crewed(range(2))
    assert not dispatcher.drained
    for block in range(2):
        dispatcher.assignments(block)
        assert not dispatcher.drained
        assert dispatcher.done("a", block, block)
    assert dispatcher.drained
    assert dispatcher.finished == {0, 1}
    assert dispatcher.assignments(2) == []
    assert dispatcher.superfluous(2) == ["a"]


def test_nothing_to_do_is_drained_at_once() -> None:
    dispatcher = crewed([])
    assert dispatcher.drained
    assert not dispatcher.hopeless
    assert dispatcher.num_wanted == 0
    assert dispatcher.assignments(0) == []
    assert dispatcher.superfluous(0) == ["a"]


def test_no_two_blocks_alike() -> None:
    with pytest.raises(AssertionError, match="alike"):
        Dispatcher([1, 2, 1])


def test_news_of_two_blocks_may_come_in_either_order() -> None:
    dispatcher = crewed(range(3))
    assert dispatcher.assignments(0) == [("a", 0), ("a", 1)]
    assert dispatcher.done("a", 1, 1)
    assert dispatcher.done("a", 0, 1)
    assert dispatcher.assignments(1) == [("a", 2)]


# Errors


def test_a_failed_block_is_next_again() -> None:
    dispatcher = crewed(range(4))
    dispatcher.assignments(0)
    dispatcher.failed("a", 0, "broken", 1)
    dispatcher.done("a", 1, 2)
    assert dispatcher.assignments(2)[0] == ("a", 0)
    assert (dispatcher.num_retries, dispatcher.num_failures(0), dispatcher.num_failures(1), dispatcher.poisoned) == (1, 1, 0, {})


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_a_block_is_given_up_after_its_attempts(attempts: int) -> None:
    dispatcher = crewed([7], attempts=attempts)
    for attempt in range(attempts):
        assert dispatcher.assignments(attempt) == [("a", 7)]
        dispatcher.failed("a", 7, f"error {attempt}", attempt)
    assert dispatcher.assignments(9) == []
    assert dispatcher.drained
    assert dispatcher.poisoned == {7: f"error {attempts - 1}"}
    assert dispatcher.num_retries == attempts - 1


def test_a_failed_block_goes_to_another_worker() -> None:
    dispatcher = crewed(range(3), "ab", ahead=1)
    dispatcher.assignments(0)
    dispatcher.failed("a", 0, "broken", 1)
    assert dispatcher.assignments(1) == [("a", 2)]
    dispatcher.done("a", 2, 2)
    assert dispatcher.assignments(2) == []
    assert dispatcher.superfluous(2) == []
    dispatcher.done("b", 1, 3)
    assert dispatcher.assignments(3) == [("b", 0)]


def test_a_failed_block_goes_to_the_same_worker_where_nobody_else_is_fed() -> None:
    dispatcher = crewed(range(4), "abc", ahead=1)
    dispatcher.assignments(0)
    dispatcher.failed("a", 0, "broken", 1)
    dispatcher.lost("b", "gone", 1)
    assert dispatcher.assignments(1) == [("a", 1)]
    dispatcher.done("a", 1, 2)
    assert dispatcher.assignments(2) == [("a", 3)]
    dispatcher.done("a", 3, 3)
    assert dispatcher.assignments(3) == []
    dispatcher.leaving("c", 0)
    assert dispatcher.assignments(3) == [("a", 0)]


def test_a_worker_on_which_everything_fails_gets_no_more() -> None:
    dispatcher = crewed(range(20), "ab", ahead=1)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [1])
    failed = []
    for now in range(2, 5):
        failed += dispatcher.held("a")
        dispatcher.failed("a", failed[-1], "bad disk", now)
        dispatcher.assignments(now)
    assert len(set(failed)) == 3
    assert dispatcher.superfluous(5) == ["a"]
    dispatcher.leaving("a", 5, until=1000)
    assert dispatcher.superfluous(5) == ["a"]
    dispatcher.lost("a", "killed", 5)
    finished_in_turn(dispatcher, "b", range(6, 25))
    assert dispatcher.drained
    assert not dispatcher.poisoned


def test_a_success_restores_trust() -> None:
    dispatcher = crewed(range(20), "ab", attempts=2, ahead=1)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [1])
    for now in (2, 4):
        dispatcher.failed("a", dispatcher.held("a")[0], "error", now)
        dispatcher.assignments(now)
        finished_in_turn(dispatcher, "a", [now + 1])
    assert dispatcher.superfluous(5) == []


def test_where_nothing_has_succeeded_no_worker_is_at_fault() -> None:
    dispatcher = crewed(range(9), "ab", attempts=2, ahead=1)
    for now in range(4):
        dispatcher.assignments(now)
        dispatcher.failed("a", dispatcher.held("a")[0], "error", now)
    assert dispatcher.superfluous(4) == []
    assert dispatcher.assignments(4) == [("a", 5)]


def test_the_only_worker_is_always_fed() -> None:
    dispatcher = crewed(range(9), attempts=2, ahead=1)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "a", [1])
    for now in range(2, 8):
        dispatcher.failed("a", dispatcher.held("a")[0], "error", now)
        assert len(dispatcher.assignments(now)) == 1
    assert len(dispatcher.poisoned) == 3


def test_a_pause_keeps_a_block_back() -> None:
    dispatcher = crewed([0, 1], ahead=1)
    dispatcher.assignments(0)
    dispatcher.failed("a", 0, "service is down", 10, pause=4)
    assert dispatcher.assignments(10) == [("a", 1)]
    assert (dispatcher.num_waiting, dispatcher.wake_at(10)) == (1, 14)
    dispatcher.done("a", 1, 11)
    assert dispatcher.assignments(13.9) == []
    assert dispatcher.superfluous(13.9) == []
    assert not dispatcher.drained
    assert dispatcher.assignments(14) == [("a", 0)]
    assert dispatcher.wake_at(14) is None


def test_outages_are_counted_apart_and_nobody_is_blamed_for_them() -> None:
    dispatcher = crewed([0], "ab", attempts=1, outages=3)
    for attempt in range(3):
        now = 10 * attempt
        assert dispatcher.num_failures(0) == attempt
        assert dispatcher.assignments(now) == [("a", 0)]
        dispatcher.failed("a", 0, "service is down", now + 1, pause=2)
        dispatcher.lost("b", "gone", now + 1)
        dispatcher.joined("b", now + 1)
    assert dispatcher.drained
    assert dispatcher.poisoned == {0: "service is down"}
    assert dispatcher.num_retries == 2


def test_hopeless_when_several_blocks_are_given_up_before_any_is_finished() -> None:
    dispatcher = crewed(range(9), attempts=1, ahead=1)
    for block in range(3):
        assert not dispatcher.hopeless
        dispatcher.assignments(block)
        dispatcher.failed("a", block, "error", block)
    assert dispatcher.hopeless
    dispatcher.assignments(4)
    dispatcher.done("a", 3, 5)
    assert not dispatcher.hopeless


# Losses


def test_what_a_lost_worker_held_is_next_again_in_the_same_order() -> None:
    dispatcher = crewed(range(9), "ab")
    assert dispatcher.assignments(0) == [("a", 0), ("b", 1), ("a", 2), ("b", 3)]
    dispatcher.lost("a", "gone", 1)
    assert dispatcher.held("a") == ()
    dispatcher.joined("c", 2)
    assert dispatcher.assignments(2) == [("c", 0), ("c", 2)]
    assert (dispatcher.num_losses, dispatcher.num_failures(0)) == (1, 0)


def test_all_that_a_lost_worker_held_keeps_its_order() -> None:
    dispatcher = crewed(range(9), "a", ahead=4)
    dispatcher.assignments(0)
    dispatcher.lost("a", "gone", 1)
    dispatcher.joined("b", 1)
    assert dispatcher.assignments(1) == [("b", block) for block in range(4)]


def test_only_the_block_that_a_lost_worker_was_at_is_suspected() -> None:
    dispatcher = crewed(range(9), "", losses=2)
    for now, (worker, first) in enumerate([("a", 0), ("b", 0), ("c", 1), ("d", 1)]):
        dispatcher.joined(worker, now)
        assert dispatcher.assignments(now) == [(worker, first), (worker, first + 1)]
        dispatcher.lost(worker, f"{worker} is gone", now)
    assert dispatcher.poisoned == {0: "b is gone", 1: "d is gone"}


def test_losses_and_errors_are_counted_apart() -> None:
    dispatcher = crewed([0], "ab", attempts=2, losses=2)
    assert dispatcher.assignments(0) == [("a", 0)]
    dispatcher.failed("a", 0, "error", 1)
    assert dispatcher.assignments(1) == [("b", 0)]
    dispatcher.lost("b", "gone", 2)
    assert dispatcher.assignments(2) == [("a", 0)]
    assert not dispatcher.poisoned


def test_losing_a_worker_without_work_changes_nothing() -> None:
    dispatcher = crewed(range(2), "ab", spares=0)
    dispatcher.lost("c", "never seen", 0)
    dispatcher.lost("a", "gone", 0)
    assert dispatcher.assignments(0) == [("b", 0)]
    dispatcher.done("b", 0, 1)
    dispatcher.lost("b", "gone", 1)
    assert (dispatcher.num_losses, dispatcher.num_waiting, dispatcher.poisoned) == (0, 1, {})


# Drained nodes


def test_a_leaving_worker_hands_back_what_it_is_not_at() -> None:
    dispatcher = crewed(range(9), "ab", ahead=3)
    dispatcher.assignments(0)
    assert dispatcher.held("a") == (0, 2, 4)
    assert dispatcher.leaving("a", 0) == [2, 4]
    assert dispatcher.held("a") == (0,)
    dispatcher.done("b", 1, 1)
    assert dispatcher.assignments(1) == [("b", 2)]
    assert dispatcher.done("a", 0, 2)
    assert dispatcher.assignments(2) == []
    assert dispatcher.superfluous(2) == ["a"]
    assert dispatcher.leaving("c", 0) == []


def test_a_leaving_worker_is_not_blamed_when_it_is_lost() -> None:
    dispatcher = crewed([0], losses=1)
    dispatcher.assignments(0)
    assert dispatcher.leaving("a", 0) == []
    dispatcher.lost("a", "preempted", 1)
    assert (dispatcher.poisoned, dispatcher.num_losses, dispatcher.num_waiting) == ({}, 0, 1)


def test_a_leaving_workers_block_is_doubled_at_once_when_nothing_waits() -> None:
    dispatcher = crewed(range(2), "abc")
    dispatcher.assignments(0)
    assert dispatcher.wake_at(1) is None
    dispatcher.leaving("b", 0)
    assert dispatcher.wake_at(1) == 1
    assert dispatcher.assignments(1) == [("c", 1)]
    assert dispatcher.num_copies == 1
    dispatcher.lost("b", "preempted", 2)
    assert dispatcher.done("c", 1, 3)


def test_a_leaving_worker_gets_what_it_has_the_time_for() -> None:
    dispatcher = crewed(range(20), "ab")
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [10, 20, 30])
    assert dispatcher.leaving("a", 30, until=70) == [2]
    dispatcher.done("a", 0, 31)
    assert dispatcher.assignments(31) == [("a", 2)]
    assert dispatcher.done("a", 2, 50)
    assert [worker for worker, _ in dispatcher.assignments(50)] == ["a"]
    dispatcher.done("a", dispatcher.held("a")[0], 60)
    assert dispatcher.assignments(60) == []
    assert dispatcher.superfluous(60) == ["a"]


def test_the_first_block_of_all_tells_a_leaving_worker_what_it_has_the_time_for() -> None:
    dispatcher = crewed(range(3), "a", ahead=1)
    dispatcher.assignments(0)
    dispatcher.leaving("a", 5, until=100)
    dispatcher.done("a", 0, 10)
    assert dispatcher.assignments(10) == [("a", 1)]
    dispatcher.done("a", 1, 95)
    assert dispatcher.assignments(95) == []


def test_a_failed_block_does_not_wait_for_a_leaving_worker() -> None:
    dispatcher = crewed(range(3), "ab", ahead=1, straggler=1000)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [1])
    dispatcher.leaving("b", 1, until=1000)
    dispatcher.failed("a", 0, "broken", 2)
    assert dispatcher.assignments(2) == [("a", 0)]


def test_an_idle_worker_that_no_longer_has_the_time_is_let_go() -> None:
    dispatcher = crewed(range(2), "ab", straggler=1000, spares=1)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [10])
    assert dispatcher.leaving("b", 10, until=100) == []
    assert (dispatcher.assignments(80), dispatcher.superfluous(80)) == ([], [])
    assert (dispatcher.assignments(90), dispatcher.superfluous(90)) == ([], ["b"])


def test_of_leaving_workers_those_without_the_time_are_in_doubt() -> None:
    dispatcher = crewed(range(4), "abc", straggler=5, patience=0)
    dispatcher.assignments(0)
    dispatcher.done("c", 2, 10)
    dispatcher.assignments(10)
    dispatcher.done("c", 3, 20)
    dispatcher.leaving("a", 20, until=1000)
    assert dispatcher.assignments(20) == []
    dispatcher.leaving("b", 20, until=14)
    assert dispatcher.assignments(20) == [("c", 1)]


# The end: stragglers, blocks taken over, workers let go


def straggling(straggler: float = 2, **policy: float) -> Dispatcher[str, int]:
    """Two workers; b, which took 4 s for each of five blocks, is idle since 20, a has been at block 0 since 0."""
    dispatcher = crewed(range(6), "ab", ahead=1, straggler=straggler, **policy)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", range(4, 21, 4))
    return dispatcher


def test_a_straggler_is_doubled_and_the_first_to_finish_counts() -> None:
    dispatcher = straggling(straggler=6)
    assert dispatcher.held("b") == ()
    assert dispatcher.wake_at(20) == 24
    assert dispatcher.assignments(23.9) == []
    assert dispatcher.assignments(24) == [("b", 0)]
    assert dispatcher.wake_at(24) is None
    assert (dispatcher.num_copies, dispatcher.num_waiting, dispatcher.stale()) == (1, 0, [])
    assert dispatcher.done("b", 0, 28)
    assert dispatcher.drained
    assert dispatcher.stale() == [("a", 0)]
    assert dispatcher.held("a") == (0,)
    dispatcher.dropped("a", 0, 28)
    assert (dispatcher.stale(), dispatcher.held("a"), dispatcher.num_waiting) == ([], (), 0)
    assert set(dispatcher.superfluous(28)) == {"a", "b"}


def test_a_copy_that_comes_second_is_no_news() -> None:
    dispatcher = straggling()
    assert dispatcher.held("b") == (0,)
    assert dispatcher.done("a", 0, 30)
    assert dispatcher.stale() == [("b", 0)]
    assert not dispatcher.done("b", 0, 31)
    assert dispatcher.stale() == []
    assert dispatcher.finished == set(range(6))


@pytest.mark.parametrize("outcome", ["failed", "lost"])
def test_a_copy_that_comes_to_nothing_is_no_news_either(outcome: str) -> None:
    dispatcher = straggling(attempts=1, losses=1)
    assert dispatcher.done("a", 0, 30)
    if outcome == "failed":
        dispatcher.failed("b", 0, "error", 31)
    else:
        dispatcher.lost("b", "gone", 31)
    assert dispatcher.drained
    assert (dispatcher.stale(), dispatcher.poisoned, dispatcher.num_losses, dispatcher.num_retries) == ([], {}, 0, 0)
    assert dispatcher.num_failures(0) == 0


def test_patience_is_the_least_that_makes_a_straggler() -> None:
    dispatcher = straggling(straggler=1, patience=100)
    assert dispatcher.wake_at(20) == 100


def test_there_is_no_straggler_before_anything_is_finished() -> None:
    dispatcher = crewed([0], "ab")
    dispatcher.assignments(0)
    assert dispatcher.wake_at(10_000) is None
    assert dispatcher.assignments(10_000) == []


def test_one_copy_is_enough() -> None:
    dispatcher = straggling()
    dispatcher.joined("c", 21)
    assert dispatcher.assignments(1e6) == []
    assert dispatcher.wake_at(1e6) is None


def test_the_longest_at_work_is_doubled_first() -> None:
    dispatcher = crewed(range(6), "abc", ahead=1, straggler=2, patience=0)
    dispatcher.assignments(0)
    for now, worker in enumerate("cca", 1):
        dispatcher.done(worker, dispatcher.held(worker)[0], now)
        dispatcher.assignments(now)
    assert [dispatcher.held(worker) for worker in "abc"] == [(5,), (1,), (4,)]
    dispatcher.joined("d", 9)
    dispatcher.joined("e", 9)
    assert dispatcher.assignments(9) == [("d", 1), ("e", 4)]


def test_a_copy_that_is_lost_is_made_again_at_once() -> None:
    dispatcher = straggling()
    assert dispatcher.superfluous(21) == []
    dispatcher.lost("b", "gone", 21)
    assert dispatcher.num_losses == 0
    dispatcher.joined("c", 22)
    assert dispatcher.assignments(22) == [("c", 0)]
    dispatcher.lost("a", "gone", 23)
    assert (dispatcher.num_losses, dispatcher.num_waiting, dispatcher.held("c")) == (0, 0, (0,))
    assert dispatcher.done("c", 0, 24)


def test_a_copy_that_fails_is_not_made_again_at_once() -> None:
    dispatcher = straggling()
    dispatcher.failed("b", 0, "error", 22)
    assert dispatcher.num_failures(0) == 1
    assert dispatcher.assignments(22) == []
    assert dispatcher.wake_at(22) == 30
    assert dispatcher.assignments(30) == [("b", 0)]


def test_a_block_is_given_up_only_when_its_last_copy_has_failed() -> None:
    dispatcher = straggling(attempts=1)
    dispatcher.failed("b", 0, "error", 22)
    assert not dispatcher.poisoned
    dispatcher.lost("a", "gone", 23)
    assert dispatcher.poisoned == {0: "gone"}
    assert dispatcher.drained


def test_an_idle_worker_takes_over_what_another_is_not_at() -> None:
    dispatcher = crewed(range(5), "ab")
    assert dispatcher.assignments(0) == [("a", 0), ("b", 1), ("a", 2)]
    finished_in_turn(dispatcher, "b", [1, 2])
    assert dispatcher.held("b") == (4,)
    assert dispatcher.done("b", 4, 3)
    assert dispatcher.assignments(3) == [("b", 2)]
    assert dispatcher.stale() == [("a", 2)]
    assert dispatcher.num_copies == 0
    dispatcher.dropped("a", 2, 3)
    assert (dispatcher.held("a"), dispatcher.held("b"), dispatcher.stale()) == ((0,), (2,), [])
    assert dispatcher.done("b", 2, 4)
    assert dispatcher.done("a", 0, 5)
    assert dispatcher.drained


def test_a_block_taken_over_by_a_worker_that_is_lost_is_still_in_hand() -> None:
    dispatcher = crewed(range(5), "ab")
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [1, 2, 3])
    dispatcher.lost("b", "gone", 4)
    assert dispatcher.stale() == []
    assert dispatcher.held("a") == (0, 2)
    dispatcher.joined("c", 5)
    assert dispatcher.assignments(5) == [("c", 2)]


def test_a_worker_that_comes_to_what_was_taken_over_from_it_keeps_it() -> None:
    dispatcher = crewed(range(5), "ab")
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [1, 2, 3])
    assert dispatcher.stale() == [("a", 2)]
    assert dispatcher.done("a", 0, 4)
    assert dispatcher.stale() == []
    assert dispatcher.done("a", 2, 5)
    assert dispatcher.stale() == [("b", 2)]


def test_dropping_the_only_copy_loses_nothing() -> None:
    dispatcher = crewed([0])
    dispatcher.assignments(0)
    dispatcher.dropped("a", 0, 1)
    assert dispatcher.assignments(1) == [("a", 0)]


def test_the_time_at_work_starts_when_the_block_is_the_first() -> None:
    dispatcher = crewed(range(8), "ab", straggler=10)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "a", range(10, 71, 10))
    assert (dispatcher.held("a"), dispatcher.held("b")) == ((), (1, 3))
    assert dispatcher.stale() == [("b", 3)]
    assert dispatcher.wake_at(70) == 100


def test_the_time_at_work_of_a_second_block_starts_when_the_first_is_done() -> None:
    dispatcher = crewed(range(5), "ab", straggler=2)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "a", [10])
    assert dispatcher.held("a") == (2,)
    finished_in_turn(dispatcher, "b", [12, 14, 16])
    # 10, 12, 2 and 2 s: the median is taken to be 10.
    assert dispatcher.wake_at(16) == 10 + 2 * 10


def test_only_recent_times_say_what_is_usual() -> None:
    median = RecentMedian()
    assert median.value == math.inf
    for number in [1000.0] * 200 + [1.0, 2.0] * 25:
        median.add(number)
    assert median.value == 2.0


@pytest.mark.parametrize(("spares", "kept"), [(0, 0), (0.05, 1), (0.5, 2), (1, 4)])
def test_idle_workers_beyond_the_spares_are_let_go(spares: float, kept: int) -> None:
    dispatcher = crewed(range(4), "abcdefghi", spares=spares)
    dispatcher.assignments(0)
    assert dispatcher.superfluous(0) == list("efghi")[kept:]
    for worker in dispatcher.superfluous(0):
        dispatcher.lost(worker, "killed", 0)
    assert dispatcher.superfluous(0) == []
    assert dispatcher.num_losses == 0


def test_nobody_is_superfluous_who_could_take_over_or_double_something() -> None:
    dispatcher = straggling(spares=0, patience=100)
    dispatcher.joined("c", 20)
    assert dispatcher.superfluous(99) == ["b", "c"]
    assert dispatcher.superfluous(100) == []
    assert dispatcher.assignments(100) == [("b", 0)]
    assert dispatcher.superfluous(100) == ["c"]
    dispatcher = crewed(range(5), "ab", spares=0)
    dispatcher.assignments(0)
    finished_in_turn(dispatcher, "b", [1, 2])
    dispatcher.joined("c", 3)
    dispatcher.joined("d", 3)
    assert dispatcher.held("a") == (0, 2)
    assert dispatcher.superfluous(3) == []
    dispatcher.assignments(3)
    assert dispatcher.superfluous(3) == ["d"]


def test_nobody_is_superfluous_while_there_is_a_block_for_everybody() -> None:
    assert crewed(range(4), "abcd", spares=0).superfluous(0) == []


def test_how_many_workers_are_wanted() -> None:
    dispatcher = crewed(range(5), "ab")
    assert dispatcher.num_wanted == 5
    dispatcher.assignments(0)
    assert dispatcher.num_wanted == 5
    dispatcher.failed("a", 0, "service is down", 1, pause=60)
    assert dispatcher.num_wanted == 5
    finished_in_turn(dispatcher, "b", [2, 3])
    assert dispatcher.num_wanted == 3


@pytest.mark.parametrize("never", [math.inf, 1e9])
def test_copies_can_be_switched_off(never: float) -> None:
    dispatcher = straggling(straggler=never)
    assert dispatcher.assignments(1e6) == []
