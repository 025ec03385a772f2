"""What this machine and this disk really do, measured once and kept in the cache directory."""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashrt.errors import DiskError

MIB = 1 << 20
PROBE_BLOCK = MIB  # with a few in flight as fast as larger ones, and small enough to measure beside a loaded model
PROBE_LEAST = 16 * MIB
PROBE_BYTES = 256 * MIB
PROBE_DEPTH = 8
PROBE_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """Rates of one disk in bytes per second, read with O_DIRECT.

    `sequential` is the best rate of reading in order, the roof under which weights stream. `random` maps
    'block/depth' (bytes, reads in flight) to a rate.
    """

    sequential: float
    random: dict[str, float] = field(default_factory=dict)


def profile_path(cache: Path) -> Path:
    return cache / "profile.json"


def load_disk_profile(cache: Path, device: int) -> DiskProfile | None:
    """The profile kept for the disk with device number `device`, if any. A damaged file counts as none."""
    try:
        entry = json.loads(profile_path(cache).read_bytes())["disks"][str(device)]
        return DiskProfile(float(entry["sequential"]), {str(k): float(v) for k, v in entry["random"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_disk_profile(cache: Path, device: int, disk: DiskProfile) -> bool:
    """Keep a profile. Returns False when the cache directory cannot be written: it is only a cache."""
    path = profile_path(cache)
    try:
        data = json.loads(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError):
        data = {}
    if not isinstance(data, dict) or not isinstance(data.get("disks"), dict):
        data = {"disks": {}}
    data["disks"][str(device)] = asdict(disk)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(data, indent=1))
        os.replace(temporary, path)
    except OSError:
        return False
    return True


def sequential_rate(path: Path, limit: int = PROBE_BYTES, depth: int = 1, block: int = PROBE_BLOCK) -> float:
    """Bytes per second of reading a file in order with O_DIRECT, `block` bytes at a time, `depth` reads in flight.

    At most `limit` bytes are read. depth 1 is the plain sequential read that users know from `dd`.
    """
    try:
        handle = _open_direct(path)
        try:
            size = min(os.fstat(handle).st_size, limit) // block * block
            offsets = iter(range(0, size, block))
            began = time.perf_counter()
            with ThreadPoolExecutor(depth) as pool:
                for future in [pool.submit(_read_all, handle, offsets, block) for _ in range(depth)]:
                    future.result()
            return size / (time.perf_counter() - began) if size else 0.0
        finally:
            os.close(handle)
    except OSError as error:
        raise DiskError(f"reading {path} failed: {error.strerror}") from None


def measure_disk(path: Path) -> DiskProfile | None:
    """A quick profile from one large file: the best of a few reads in order, with one and with several in flight.

    None when the file is too small to tell.

    The best, because it is taken for a roof: other users of a disk only ever make a reading too low.
    """
    if path.stat().st_size < PROBE_LEAST:
        return None
    return DiskProfile(
        max(sequential_rate(path, depth=depth) for depth in (1, PROBE_DEPTH) for _ in range(PROBE_ROUNDS))
    )


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without O_DIRECT
            raise
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return handle


def _read_all(handle: int, offsets: Iterator[int], block: int) -> None:
    """Read the blocks that no other thread has taken. A range's iterator hands each offset out once."""
    with mmap.mmap(-1, block) as buffer, memoryview(buffer) as view:
        for offset in offsets:
            os.preadv(handle, [view], offset)
