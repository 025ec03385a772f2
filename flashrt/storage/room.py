"""Room on a disk, compared with what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from flashrt.errors import DiskError


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder that may be made yet. Raises DiskError."""
    folder = folder.absolute()
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        return shutil.disk_usage(there).free
    except OSError as error:
        raise DiskError(f"{folder} cannot be looked at: {error.strerror}") from None


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raises DiskError where `what`, of `needed` bytes, does not fit on the disk of a folder that may be made yet."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskError(
            f"{what} needs {needed / 1e9:.2f} GB more in {folder.absolute()}, the disk has {free / 1e9:.2f} GB free: "
            f"free some space, {remedy}"
        )
