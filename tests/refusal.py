"""How every command refuses bad input."""

import pytest


def only_error(capfd: pytest.CaptureFixture, *expected: str) -> None:
    """One line that begins with `error: `, the last, with all `expected` words, and no traceback."""
    shown = capfd.readouterr()
    errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, shown.err
    assert shown.err.rstrip().endswith(errors[0]), "the error is the last line"
    assert "Traceback" not in shown.err
    for words in expected:
        assert words in errors[0]
