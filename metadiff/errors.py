"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Bad input: a command prints its message as one line and exits with code 2.

    The message says what is wrong, where, what was expected and what to do.
    """
