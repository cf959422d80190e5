"""What the others have done, all of it."""

import pytest

from tests.chaos.ledger import ENOUGH_IN_ALL, Ledger

pytestmark = pytest.mark.chaos


def test_enough_of_every_kind(ledger: Ledger) -> None:
    """Fails if only some of the tests were run."""
    assert not ledger.short()
    assert ledger.skipped or ledger.proven >= ENOUGH_IN_ALL
