"""Shards that a disk or a person has damaged, after and while they are fitted."""

from collections.abc import Callable

import pytest

from tests.chaos.case import Case, NewCase
from tests.chaos.commands import NUM_BLOCKS
from tests.chaos.ledger import ENOUGH, FLIPPED, TRUNCATED
from tests.chaos.places import Bucket, blocks, shard_name

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_of_a_whole_store(where: str, new_case: NewCase, bucket: Callable[[], Bucket]) -> None:
    case = new_case(place=bucket() if where == "s3" else None)
    case.fill(0)
    victims = case.rng.sample(range(NUM_BLOCKS), ENOUGH)
    for block in victims:
        damage(case, block, TRUNCATED if block in victims[: ENOUGH // 2] else FLIPPED)
    found = case.verify()
    assert found.returncode == 1
    assert all(f"  block {block} " in found.stdout for block in victims), found.stdout
    case.fit().start().finish()
    case.prove()


def test_while_it_is_fitted(new_case: NewCase) -> None:
    case = new_case()
    fit = case.fit().start()
    damaged: set[int] = set()
    for kind in (TRUNCATED, FLIPPED) * (ENOUGH // 2):
        assert case.wait_for_commits(fit, 1)
        block = case.rng.choice(sorted(blocks(case.place) - damaged))
        damage(case, block, kind)
        damaged.add(block)
    assert fit.running
    fit.finish()
    case.prove()


def damage(case: Case, block: int, kind: str) -> None:
    name = shard_name(block)
    content = case.place.read(name)
    if kind == TRUNCATED:
        harmed = content[: case.rng.choice([0, case.rng.randrange(len(content)), len(content) - 1])]
    else:
        place = case.rng.choice([case.rng.randrange(len(content)), case.rng.randrange(400)])
        harmed = content[:place] + bytes([content[place] ^ 1 << case.rng.randrange(8)]) + content[place + 1 :]
    case.place.write(name, harmed)
    assert case.place.read(name) != content
    case.hit(kind)
