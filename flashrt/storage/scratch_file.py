"""A file without a name for what memory does not hold: gone when its process ends, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

import numpy as np

from flashrt.config import GIB
from flashrt.errors import DiskError
from flashrt.storage.direct import open_direct

PREFIX = "flashrt-kv-"


class ScratchFile:
    """`nbytes` of disk in `folder`, taken at once: no write fails later for lack of room.

    `direct` says whether reads and writes go around the page cache; they begin and end at multiples of 4096 bytes.
    Raises DiskError when the folder cannot be written to, or lacks the room.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.path, self.nbytes = folder / f"{PREFIX}{secrets.token_hex(8)}", nbytes
        self.handle, self.direct = open_direct(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.unlink(self.path)
            os.posix_fallocate(self.handle, 0, max(nbytes, 1))
        except OSError as error:
            self.close()
            raise DiskError(_no_room(folder, nbytes, error)) from None

    def write(self, offset: int, data: np.ndarray) -> None:
        """Write `data` (uint8 [n]), all of it, to byte `offset`. Raises DiskError."""
        left = memoryview(data.data)
        try:
            while left:
                written = os.pwrite(self.handle, left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            raise DiskError(f"writing {self.path} at byte {offset} failed: {error.strerror}") from None

    def close(self) -> None:
        """Give the room back. Closing again does nothing."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def _no_room(folder: Path, nbytes: int, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{folder} takes no file of {nbytes / GIB:.3f} GiB for keys and values: {error.strerror}"
    free = "an unknown part"
    with contextlib.suppress(OSError):
        free = f"{_free_bytes(folder) / GIB:.3f} GiB"
    return (
        f"keys and values that do not fit in memory need {nbytes / GIB:.3f} GiB of disk in {folder}, {free} is free: "
        "make room, name another directory with --kv-dir, or use a shorter --context or a larger --budget-gb"
    )


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
