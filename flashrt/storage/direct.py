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
