"""Files opened around the page cache."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flashrt.errors import DiskError


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor to read from, and whether it is O_DIRECT: some file systems have none. Raises DiskError."""
    try:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without O_DIRECT answers
                raise
            return os.open(path, os.O_RDONLY), False
    except OSError as error:
        raise DiskError(f"{path} cannot be opened: {error.strerror}") from None
