"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flashrt.errors import DiskError


@contextlib.contextmanager
def replacing(path: Path, suffix: str = ".tmp") -> Iterator[IO[bytes]]:
    """A file to write, which takes the name `path` when the block ends: synced, in place of what was there.

    Until then it is called `path` + `suffix`; writers that may meet take suffixes of their own. A block that fails
    removes it and leaves `path` as it was. Raises OSError.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        with open(temporary, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_leftovers(path: Path) -> None:
    """Remove what `replacing` with a suffix of ".PID.tmp" left of `path` where the process was killed meanwhile."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not _runs(int(pid)):
            left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file. Raises DiskError."""
    with disk_errors(path.parent), replacing(path) as handle:
        handle.write(data)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns an OSError of writing below `out` into a DiskError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskError(f"the disk of {out} is full: free some space and run the same command again") from None
        raise DiskError(f"writing to {out} failed: {error.strerror}") from None


def sync_directory(path: Path) -> None:
    """Have names that were given or taken there outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
