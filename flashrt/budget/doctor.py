"""Measurements behind `flashrt doctor`: what this machine's disk and memory really give."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.profile import DiskProfile, measure_disk, sequential_rate
from flashrt.errors import DiskError

KIB = 1 << 10
MIB = 1 << 20
BLOCKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
DEPTHS = (1, 4, 16)
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
    profile: DiskProfile
    plain: float  # bytes per second of one reader that reads in order


def examine_disk(directory: Path, progress: Progress = lambda done, total: None) -> DiskFigures:
    """Read a temporary file of up to 1 GiB in `directory`, in blocks of several sizes, several at a time.

    The file has no name and is gone with the process, whatever happens. Raises DiskError when there is no room for it.
    """
    points = list(itertools.product(BLOCKS, DEPTHS))
    with _file(directory, len(points) + 1, progress) as (path, nbytes):
        plain = max(sequential_rate(path) for _ in range(2))
        quick = measure_disk(path)
        best = plain if quick is None else max(plain, quick.sequential)
        handle, direct = _open(path)
        try:
            rates = {}
            for done, (block, depth) in enumerate(points, 1):
                rates[f"{block}/{depth}"] = _random_rate(handle, nbytes, block, depth)
                progress(done + 1, len(points) + 1)
        finally:
            os.close(handle)
    return DiskFigures(directory, directory.stat().st_dev, direct, DiskProfile(best, rates), plain)


def memory_bandwidth(kernels: Any, seconds: float = 0.5) -> float | None:
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
def _file(directory: Path, steps: int, progress: Progress) -> Iterator[tuple[Path, int]]:
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
            yield Path(f"/proc/self/fd/{handle.fileno()}"), nbytes
    except OSError as error:
        raise DiskError(f"measuring the disk of {directory} failed: {error.strerror}") from None


def _open(path: Path) -> tuple[int, bool]:
    with suppress(OSError):
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    return os.open(path, os.O_RDONLY), False


def _random_rate(handle: int, nbytes: int, block: int, depth: int) -> float:
    """Bytes per second of reads at random places, `depth` threads with one read each."""
    totals = [0] * depth
    began = time.perf_counter()
    until = began + POINT_S

    def work(index: int) -> None:
        places = random.Random(index)
        with mmap.mmap(-1, block) as buffer, memoryview(buffer) as view:
            while time.perf_counter() < until:
                totals[index] += os.preadv(handle, [view], places.randrange(nbytes // block) * block)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(totals) / (time.perf_counter() - began)
