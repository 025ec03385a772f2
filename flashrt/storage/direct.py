"""Files opened around the page cache."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flashrt.errors import DiskError


def open_direct(path: Path, flags: int = os.O_RDONLY) -> tuple[int, bool]:
    """A descriptor, and whether it is O_DIRECT: some file systems have none. Raises DiskError."""
    try:
        try:
            return os.open(path, flags | os.O_DIRECT, 0o600), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without O_DIRECT answers, perhaps behind O_CREAT
                raise
            return os.open(path, flags & ~os.O_EXCL, 0o600), False
    except OSError as error:
        raise DiskError(f"{path} cannot be opened: {error.strerror}") from None


def open_cached(path: Path) -> tuple[int, bool]:
    """A descriptor through the page cache, which reads nothing ahead, and whether it tells what the cache holds.

    Linux tells it only to those who may write to a file: to others it says that all is there. Raises DiskError.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    except OSError as error:
        raise DiskError(f"{path} cannot be opened: {error.strerror}") from None
    return handle, os.access(path, os.W_OK, effective_ids=True)
