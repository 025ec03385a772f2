"""What this machine and this disk really do, measured once and kept in the cache directory."""

from __future__ import annotations

import json
import mmap
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flashrt.errors import DiskError

MIB = 1 << 20
PROBE_BLOCK = 4 * MIB
PROBE_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """Rates of one disk in bytes per second, read with O_DIRECT.

    `sequential` is one reader, 4 MiB at a time. `random` maps 'block/depth' (bytes, reads in flight) to a rate.
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


def sequential_rate(path: Path, limit: int = PROBE_BYTES) -> float:
    """Bytes per second of a plain sequential O_DIRECT read of a file, 4 MiB at a time, at most `limit` bytes."""
    try:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(-1, PROBE_BLOCK) as buffer:
            view = memoryview(buffer)
            try:
                began, done = time.perf_counter(), 0
                while done < limit and (count := os.preadv(handle, [view], done)) == PROBE_BLOCK:
                    done += count
                seconds = time.perf_counter() - began
            finally:
                view.release()
                os.close(handle)
    except OSError as error:
        raise DiskError(f"reading {path} failed: {error.strerror}") from None
    return done / seconds if done else 0.0
