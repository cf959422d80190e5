"""Two commands at once on one store."""

from collections.abc import Callable
from itertools import islice

import pytest

from tests.chaos.case import Case, NewCase, summary
from tests.chaos.ledger import DRIVER, ENOUGH, RACE
from tests.chaos.places import Bucket

pytestmark = pytest.mark.chaos

NUM_LEFT = 20
_MOST_RACES = 12


def test_two_processes(new_case: NewCase, bucket: Callable[[], Bucket]) -> None:
    """In a folder and on S3 by turns; each is a command without Ray."""
    races = (race(new_case(place=bucket() if number % 2 else None)) for number in range(_MOST_RACES))
    assert len(list(islice(filter(None, races), ENOUGH - 2))) == ENOUGH - 2


def test_two_crews(on_cluster: NewCase) -> None:
    races = (race(on_cluster("ray.num_actors=1")) for _ in range(_MOST_RACES))
    assert next(filter(None, races))


def test_one_is_killed_and_comes_again(on_cluster: NewCase) -> None:
    case = on_cluster("ray.num_actors=1")
    unlucky, other = case.fit().start(), case.fit().start()
    assert case.wait_for_commits(unlucky, 6)
    case.pause(0.5)
    assert other.running
    assert case.left()
    assert unlucky.kill()
    case.hit(DRIVER)
    case.hit(RACE)
    unlucky.start().finish()
    other.finish()
    case.prove()


def race(case: Case) -> bool:
    """Each has all of the blocks in the end; whether both have fitted some of them."""
    case.fill(NUM_LEFT)
    rivals = [case.fit(), case.fit()]
    for fit in rivals:
        fit.start()
    for fit in rivals:
        fit.finish()
    met = all(summary(fit)["fitted"] for fit in rivals)
    if met:
        case.hit(RACE)
    case.prove()
    return met
