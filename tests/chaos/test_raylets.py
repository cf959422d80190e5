"""kill -9 of whole nodes of a cluster."""

from functools import partial

import pytest

from tests.chaos.case import Case, NewCase, besiege
from tests.chaos.commands import Fit, actors, kill
from tests.chaos.ledger import ENOUGH, RAYLET
from tests.chaos.raylets import Raylets

pytestmark = pytest.mark.chaos


def test_raylets(on_cluster: NewCase, cluster: Raylets) -> None:
    """A node dies at work; another joins."""
    besiege(on_cluster, partial(kill_raylets, cluster), RAYLET, ENOUGH)


def kill_raylets(cluster: Raylets, case: Case, fit: Fit) -> None:
    while case.ledger.hits(RAYLET) < ENOUGH and case.wait_for_commits(fit, 2):
        case.pause(0.5)
        victims = [raylet for raylet in cluster.alive if actors([raylet.pid], at_work=True)]
        if victims and kill(case.rng.choice(victims)) and case.left():
            case.hit(RAYLET)
        cluster.fill(2)
