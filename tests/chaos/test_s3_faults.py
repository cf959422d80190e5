"""An S3 service that fails, dawdles and hangs up."""

from collections.abc import Callable

import pytest

from tests.chaos.case import Case, NewCase
from tests.chaos.commands import NUM_BLOCKS
from tests.chaos.ledger import ANSWERS_500, ANSWERS_503, CUT, ENOUGH, LOST, SLOW
from tests.chaos.places import Bucket, shard_name
from tests.chaos.proxy import HOLD, Fault, Proxy

pytestmark = pytest.mark.chaos

WHILE_SENDING = (ANSWERS_500, ANSWERS_503, SLOW, CUT, LOST)
WHILE_READING = (ANSWERS_500, ANSWERS_503, SLOW)
OUTLASTS_A_REQUEST = 7
"""Failures in a row: one more than a client asks for."""


def test_one_process(new_case: NewCase, s3: tuple[Proxy, object], bucket: Callable[[], Bucket]) -> None:
    case = new_case(place=bucket())
    fit_through(case, s3[0], passing(case))


def test_actors(on_cluster: NewCase, s3: tuple[Proxy, object], bucket: Callable[[], Bucket]) -> None:
    """One request is never answered, and two blocks have their service down for longer than a request is repeated."""
    case = on_cluster(place=bucket())
    faults = passing(case)
    spared = sorted(set(map(shard_name, range(NUM_BLOCKS))) - {fault.name for fault in faults})
    first, second, third = case.rng.sample(spared, 3)
    lasting = [Fault(ANSWERS_500, "PUT", first, OUTLASTS_A_REQUEST), Fault(ANSWERS_503, "PUT", second, OUTLASTS_A_REQUEST)]
    fit_through(case, s3[0], [*faults, *lasting, Fault(HOLD, "PUT", third)])


def passing(case: Case) -> list[Fault]:
    """Faults that each befall one request, for drawn shards: as many of each kind as half a session needs."""
    names = iter(map(shard_name, case.rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)))
    kinds = [("PUT", kind) for kind in WHILE_SENDING * (ENOUGH // 2)] + [("GET", kind) for kind in WHILE_READING]
    return [Fault(kind, method, next(names), seconds=case.rng.uniform(0.5, 2.0)) for method, kind in kinds]


def fit_through(case: Case, proxy: Proxy, faults: list[Fault]) -> None:
    proxy.faults = faults
    case.fit().start().finish()
    for fault in faults:
        assert fault.hits == fault.times, f"{fault.kind}: {fault.hits} times of {fault.times}"
        case.hit(SLOW if fault.kind == HOLD else fault.kind)
    proxy.clear()
    case.prove()
