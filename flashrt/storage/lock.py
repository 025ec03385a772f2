"""Lock files: what is written to by one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from flashrt.errors import UsageError


def lock(path: Path, busy: str | None = None) -> IO[str]:
    """Open the file at `path`, made if it is not there, and hold it until it is closed or the process has gone.

    Waits while another process holds it; given `busy`, raises UsageError with that text instead. A child that inherits
    the open file holds it as well. Raises OSError where the file cannot be opened.
    """
    while True:
        handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
            if _is_at(handle, path):
                return handle
        except BaseException as error:
            handle.close()
            if busy is not None and isinstance(error, BlockingIOError):
                raise UsageError(busy) from None
            raise
        handle.close()


def _is_at(handle: IO[str], path: Path) -> bool:
    """Whether an open file is still the one at `path`: who held it before may have deleted it."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
