"""kill -9 of the command and of its actors, at any moment."""

from functools import partial

import pytest

from tests.chaos.case import Case, NewCase, besiege
from tests.chaos.commands import Fit, actors, kill, wait_until
from tests.chaos.ledger import ACTOR, DRIVER, ENOUGH, TWICE

pytestmark = pytest.mark.chaos


def test_actors(new_case: NewCase) -> None:
    besiege(partial(new_case, "ray.num_actors=2"), kill_actors, ACTOR, ENOUGH)


def test_actors_and_those_who_replace_them(new_case: NewCase) -> None:
    besiege(partial(new_case, "ray.num_actors=2"), kill_actors_twice, TWICE, ENOUGH // 2)


@pytest.mark.parametrize(("where", "share"), [("new_case", 0.25), ("on_cluster", 1.0)])
def test_drivers(where: str, share: float, request: pytest.FixtureRequest) -> None:
    """After the first kill the command is started and killed again, with or without commits of its own between the two."""
    new_case = request.getfixturevalue(where)
    besiege(partial(new_case, "ray.num_actors=2"), partial(kill_drivers, share=share), DRIVER, int(share * ENOUGH))


def kill_actors(case: Case, fit: Fit) -> None:
    while case.ledger.hits(ACTOR) < ENOUGH and case.wait_for_commits(fit, 2):
        case.pause(0.5)
        victims = actors([fit.pid], at_work=True)
        if victims and kill(case.rng.choice(victims)) and case.left():
            case.hit(ACTOR)


def kill_actors_twice(case: Case, fit: Fit) -> None:
    while case.ledger.hits(TWICE) < ENOUGH // 2 and case.wait_for_commits(fit, 2):
        before = set(actors([fit.pid]))
        victims = actors([fit.pid], at_work=True)
        if victims and kill(case.rng.choice(victims)):
            wait_until(partial(replaced_or_over, case, fit, before), "an actor in its place")
            case.pause(1.0)
            successors = sorted(set(actors([fit.pid])) - before, key=lambda process: process.pid)
            if successors and kill(successors[0]) and case.left():
                case.hit(TWICE)


def replaced_or_over(case: Case, fit: Fit, before: set) -> bool:
    return bool(set(actors([fit.pid])) - before) or not case.left() or not fit.running


def kill_drivers(case: Case, fit: Fit, share: float) -> None:
    while case.ledger.hits(DRIVER) < share * ENOUGH and case.wait_for_commits(fit, 3):
        case.pause(0.5)
        if case.left() and fit.kill():
            case.hit(DRIVER)
            fit.start()
        if case.ledger.hits(TWICE) < (1 + share) * ENOUGH / 2:
            fit.wait_until_it_says("fit_targets: building")
            case.pause(4.0)
            if case.left() and fit.kill():
                case.hit(TWICE)
                fit.start()
