"""Seeing a file the moment it is made: Linux's inotify."""

import ctypes
import os
import select
import struct
from pathlib import Path

_CREATED = 0x100
_EVENT = struct.Struct("iIII")


class Watch:
    """Tells what is made in a folder from now on."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0 or libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _CREATED) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))

    def next(self, seconds: float) -> list[str]:
        """The names made since the last call, or within so many seconds."""
        if not select.select([self._descriptor], [], [], seconds)[0]:
            return []
        content, names = os.read(self._descriptor, 2**16), []
        while content:
            *_, length = _EVENT.unpack_from(content)
            names.append(content[_EVENT.size : _EVENT.size + length].rstrip(b"\0").decode())
            content = content[_EVENT.size + length :]
        return names

    def close(self) -> None:
        """End it."""
        os.close(self._descriptor)
