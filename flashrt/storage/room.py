"""Room on a disk, compared with what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from flashrt.errors import DiskError


def check_room(folder: Path, needed: int, what: str, remedy: str) -> None:
    """Raises DiskError where `what`, of `needed` bytes, does not fit on the disk of a folder that may be made yet."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskError(
            f"{what} needs {needed / 1e9:.2f} GB more in {folder}, the disk has {free / 1e9:.2f} GB free: "
            f"free some space, {remedy}"
        )
