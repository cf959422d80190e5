"""A user's mistakes and the machine's troubles: what gets one line rather than a traceback."""

import errno


class UserError(ValueError):
    """Bad input: a command prints its message as one line and exits with code 2.

    The message says what is wrong, where, what was expected and what to do.
    """


DISK_TROUBLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some, or set run.dir to another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set run.dir to a folder that you may write to"),
}
"""What an OSError may be about for the user to mend, by its errno, and how."""
