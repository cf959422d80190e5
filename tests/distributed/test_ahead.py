import threading

import pytest

from distributed.ahead import ahead


def test_results_come_in_order_and_no_more_are_begun_than_allowed() -> None:
    begun: list[int] = []
    results = ahead(lambda item: begun.append(item) or item**2, range(20), num_threads=3)
    for number, result in enumerate(results):
        assert result == number**2
        assert len(begun) <= number + 3


def test_items_are_worked_on_at_once() -> None:
    meeting = threading.Barrier(3)
    assert len(list(ahead(lambda _: meeting.wait(timeout=60), range(3), num_threads=3))) == 3


def test_an_error_comes_in_its_place_and_ends_the_rest() -> None:
    results = ahead(lambda item: 1 / item, [2, 1, 0, *range(1, 50)], num_threads=2)
    assert [next(results), next(results)] == [0.5, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []
