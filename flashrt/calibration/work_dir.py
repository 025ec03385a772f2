"""The working directory of a calibration: inside the pack, until all is done."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashrt.errors import DiskError
from flashrt.storage.atomic import write_atomically
from flashrt.storage.lock import lock

WORK_DIR = "sparse.partial"
ROOM = 64 << 20  # bytes that a disk is left with


@contextlib.contextmanager
def work_dir(path: Path, job: dict[str, Any], name: str = WORK_DIR) -> Iterator[Path]:
    """The directory, held for this calibration alone, with what an earlier one of the same job left.

    Removed at the end of a calibration that does not fail. Raises UsageError while another process has it.
    """
    work = path / name
    try:
        work.mkdir(exist_ok=True)
        held = lock(work / "lock", busy=f"another process is calibrating {path}")
    except OSError as error:
        raise DiskError(f"cannot write to {path}: {error.strerror}") from None
    with held:
        noted = work / "job.json"
        if not (noted.exists() and noted.read_text() == json.dumps(job)):
            for entry in work.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_atomically(noted, json.dumps(job).encode())
        yield work
        shutil.rmtree(work)


def check_room(folder: Path, needed: int) -> None:
    """Raises DiskError when so many bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed + ROOM:
        raise DiskError(f"calibration needs {needed / 1e9:.2f} GB more in {folder}, {free / 1e9:.2f} GB are free")
