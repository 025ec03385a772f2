"""Lock files: what is written to by one process at a time."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from flashrt.errors import UsageError


def lock(path: Path, busy: str | None = None) -> IO[str]:
    """Open the file at `path`, made if it is not there, and hold it until it is closed or the process has gone.

    Waits while another process holds it; given `busy`, raises UsageError with that text instead. A child that inherits
    the open file holds it as well. Raises OSError where the file cannot be opened.
    """
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
    except BaseException as error:
        handle.close()
        if busy is not None and isinstance(error, BlockingIOError):
            raise UsageError(busy) from None
        raise
    return handle
