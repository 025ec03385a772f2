"""What this machine and this disk really do, measured once and kept in the cache directory."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter

from flashrt.errors import DiskError
from flashrt.storage.atomic import replacing
from flashrt.storage.cost import CostCurve
from flashrt.storage.direct import open_direct
from flashrt.storage.meter import Meter
from flashrt.storage.reader import CHUNK_BYTES, DEPTH

MIB = 1 << 20
PLAIN_BLOCK = MIB
PLAIN_BYTES = 256 * MIB
PLAIN_DEPTH = 8  # threads of the independent measurement: more are no faster
PROBE_LEAST = 16 * MIB
PROBE_S = 0.1  # seconds of one reading in order
PROBE_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class DiskProfile:
    """Rates of one disk in bytes per second, read with O_DIRECT.

    `sequential` is the best rate of reading in order, the roof under which weights stream. `random` maps
    'block/depth' (bytes, reads in flight) to a rate.
    """

    sequential: float
    random: dict[str, float] = field(default_factory=dict)

    def curve(self) -> CostCurve | None:
        """What random reads cost at the depth that the reader keeps. None when it was not measured."""
        points = (key.split("/") for key in self.random)
        rates = {int(block): self.random[f"{block}/{depth}"] for block, depth in points if int(depth) == DEPTH}
        return CostCurve(rates) if rates else None


class DiskRoof:
    """The best rate known of a disk. A run that is faster shows that it was measured too low, and raises it."""

    def __init__(self, cache: Path, device: int, profile: DiskProfile) -> None:
        self._cache, self._device, self._profile = cache, device, profile

    def curve(self) -> CostCurve | None:
        """See `DiskProfile.curve`."""
        return self._profile.curve()

    def share(self, rate: float) -> float:
        """`rate` (bytes per second) as a share of the roof: at most 1."""
        if rate > self._profile.sequential:
            self._profile = replace(self._profile, sequential=rate)
            save_disk_profile(self._cache, self._device, self._profile)
        return rate / self._profile.sequential


def profile_path(cache: Path) -> Path:
    return cache / "profile.json"


def load_disk_profile(cache: Path, device: int) -> DiskProfile | None:
    """The profile kept for the disk with device number `device`, if any. A damaged file counts as none."""
    try:
        entry = json.loads(profile_path(cache).read_bytes())["disks"][str(device)]
        profile = DiskProfile(float(entry["sequential"]), {str(k): float(v) for k, v in entry["random"].items()})
        profile.curve()  # raises what a damaged one raises
        return profile if profile.sequential > 0 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
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
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(path, f".{os.getpid()}.tmp") as handle:
            handle.write(json.dumps(data, indent=1).encode())
    except OSError:
        return False
    return True


def measure_disk(path: Path) -> DiskProfile | None:
    """A quick profile from one large file, in well under a second. None when the file is too small to tell.

    The best of a few readings is taken for the roof: other users of a disk only ever make a reading too low.
    """
    if path.stat().st_size < PROBE_LEAST:
        return None
    with Meter(path) as meter:
        sequential = max(meter.rate(CHUNK_BYTES, DEPTH, PROBE_S, in_order=True) for _ in range(PROBE_ROUNDS))
        return DiskProfile(sequential, {f"{block}/{DEPTH}": rate for block, rate in meter.curve(DEPTH).items()})


def sequential_rate(path: Path, limit: int = PLAIN_BYTES, depth: int = 1, block: int = PLAIN_BLOCK) -> float:
    """Bytes per second of reading a file in order with O_DIRECT, `block` bytes at a time, `depth` reads in flight.

    At most `limit` bytes are read. depth 1 is the plain sequential read that users know from `dd`. Nothing of the I/O
    engine is used: this is what its figures are checked against.
    """
    handle, direct = open_direct(path)
    try:
        if not direct:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = min(os.fstat(handle).st_size, limit) // block * block
        offsets = iter(range(0, size, block))
        began = perf_counter()
        with ThreadPoolExecutor(depth) as pool:
            for future in [pool.submit(_read_all, handle, offsets, block) for _ in range(depth)]:
                future.result()
        return size / (perf_counter() - began) if size else 0.0
    except OSError as error:
        raise DiskError(f"reading {path} failed: {error.strerror}") from None
    finally:
        os.close(handle)


def _read_all(handle: int, offsets: Iterator[int], block: int) -> None:
    """Read the blocks that no other thread has taken. A range's iterator hands each offset out once."""
    with mmap.mmap(-1, block) as buffer, memoryview(buffer) as view:
        for offset in offsets:
            os.preadv(handle, [view], offset)
