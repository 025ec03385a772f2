"""Measurements behind `flashrt doctor`: what this machine's disk and memory really give."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.errors import DiskError
from flashrt.machine.disk import DiskProfile, sequential_rate
from flashrt.storage.meter import Meter
from flashrt.storage.reader import CHUNK_BYTES, DEPTH

KIB = 1 << 10
MIB = 1 << 20
BLOCKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
DEPTHS = (1, 8, DEPTH)
IN_ORDER_ROUNDS = 4
FILE_BYTES = 1 << 30
SMALLEST_FILE = 256 * MIB
POINT_S = 0.25  # seconds per pair of block size and depth
MEMORY_BYTES = 256 * MIB  # well beyond any cache

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """What was measured of the disk that holds `directory`; `direct` is False where its file system has no O_DIRECT."""

    directory: Path
    device: int
    direct: bool
    backend: str  # of the I/O engine
    profile: DiskProfile
    plain: float  # bytes per second of one reader that reads in order


def examine_disk(directory: Path, progress: Progress = lambda done, total: None) -> DiskFigures:
    """Read a temporary file of up to 1 GiB in `directory`, in blocks of several sizes, several at a time.

    The file has no name and is gone with the process, whatever happens. Raises DiskError when there is no room for it.
    """
    points = list(itertools.product(BLOCKS, DEPTHS))
    with _file(directory, len(points) + 1, progress) as path, Meter(path) as meter:
        plain = max(sequential_rate(path) for _ in range(2))
        in_order = max(meter.rate(CHUNK_BYTES, DEPTH, POINT_S, in_order=True) for _ in range(IN_ORDER_ROUNDS))
        rates = {}
        for done, (block, depth) in enumerate(points, 1):
            rates[f"{block}/{depth}"] = meter.rate(block, depth, POINT_S)
            progress(done + 1, len(points) + 1)
        profile = DiskProfile(max(plain, in_order), rates)
        return DiskFigures(directory, directory.stat().st_dev, meter.direct, meter.backend, profile, plain)


def memory_bandwidth(kernels: object, seconds: float = 0.5) -> float | None:
    """Bytes per second that the compute threads read from memory; None when the kernels cannot tell."""
    read = getattr(kernels, "read_bandwidth", None)
    if read is None:
        return None
    data = np.ones(MEMORY_BYTES, np.uint8)
    read(data)
    best, until = 0.0, time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        read(data)
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


@contextmanager
def _file(directory: Path, steps: int, progress: Progress) -> Iterator[Path]:
    """A nameless file of random bytes, on disk rather than in the page cache."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
        nbytes = min(FILE_BYTES, free // 4 // MIB * MIB)
        if nbytes < SMALLEST_FILE:
            raise DiskError(
                f"{directory} has {free / 1e9:.2f} GB free: measuring a disk takes a temporary file of at least "
                f"{SMALLEST_FILE / 1e9:.2f} GB and must leave room for others. Free some space, or name another --dir"
            )
        with tempfile.TemporaryFile(dir=directory, buffering=0) as handle:
            chunk = os.urandom(4 * MIB)
            for written in range(0, nbytes, len(chunk)):
                handle.write(chunk)
                if written % (64 * MIB) == 0:
                    os.fdatasync(handle.fileno())
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            progress(1, steps)
            yield Path(f"/proc/self/fd/{handle.fileno()}")
    except OSError as error:
        raise DiskError(f"measuring the disk of {directory} failed: {error.strerror}") from None
