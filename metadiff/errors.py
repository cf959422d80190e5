"""A user's mistakes and the machine's troubles: what gets one line rather than a traceback."""

import errno


class UserError(ValueError):
    """Bad input: a command prints its message as one line and exits with code 2.

    The message says what is wrong, where, what was expected and what to do.

    Attributes:
        exit_code: the command's.
        work_kept: whether a stage got somewhere before this came up, and its workspace is to stay for the next command.
    """

    exit_code: int = 2
    work_kept: bool = False


class Unfinished(UserError):
    """A part of the work failed every time, the rest is done: the same command tries only that part again. Exit code 3."""

    exit_code = 3
    work_kept = True


DISK_TROUBLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some, or set run.dir to another disk"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "set run.dir to a folder that you may write to"),
}
"""What an OSError may be about for the user to mend, by its errno, and how."""
