"""What this process holds and may use: resident memory, cores, limits.

The kernel's own files are read for what psutil does not know: the high-water mark of the resident set, and cgroups.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

PROC = Path("/proc/self")
UNLIMITED = 1 << 60  # version 1 says 'no limit' with a number near 2**63


def resident_bytes() -> int:
    """Resident set of this process now, file-backed pages included."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident set that this process has had."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has available, cut by a cgroup limit."""
    return min([int(psutil.virtual_memory().available), *_cgroup_left()])


def installed_bytes() -> int:
    """Memory of the machine."""
    return int(psutil.virtual_memory().total)


def reset_peak() -> None:
    """Make `peak_resident_bytes` start again from what is resident now, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release_free_memory() -> None:
    """Give memory that the C allocator holds but does not use back to the kernel (a no-op outside glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut by a cgroup CPU quota."""
    cores = len(psutil.Process().cpu_affinity())
    quota = _cgroup_cores()
    return max(1, min(cores, int(quota + 0.5))) if quota else cores


def memory_limit() -> int | None:
    """The smallest memory limit among the cgroups of this process and their ancestors, in bytes."""
    return min((limit for limit, _ in _memory_limits()), default=None)


def _cgroup_cores() -> float | None:
    quotas = (group.pair(("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")) for group in _cgroups("cpu"))
    return min((quota / period for quota, period in filter(None, quotas) if quota > 0 and period > 0), default=None)


def _cgroup_left() -> list[int]:
    """What the cgroups of this process leave it, for those with a limit."""
    return [max(limit - used, 0) for limit, used in _memory_limits()]


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each cgroup with a limit. File pages that nobody uses can be taken back: not in use."""
    for group in _cgroups("memory"):
        found = group.pair(("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
        if found is not None and found[0] < UNLIMITED:
            words = group.words("memory.stat")
            stat = dict(zip(words[::2], words[1::2], strict=False))
            reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))  # version 1, version 2
            yield found[0], max(found[1] - reclaimable, 0)


@dataclass(frozen=True, slots=True)
class _Cgroup:
    path: Path

    def words(self, *names: str) -> list[str]:
        """The words of these files, one after the other; none when a file is missing."""
        try:
            return [word for name in names for word in (self.path / name).read_text().split()]
        except OSError:
            return []

    def pair(self, *choices: tuple[str, ...]) -> tuple[int, int] | None:
        """The two numbers in the first of these choices of files; None when none has two, but 'max', say."""
        for names in choices:
            with contextlib.suppress(ValueError):
                first, second = map(int, self.words(*names))
                return first, second
        return None


def _cgroups(controller: str) -> Iterator[_Cgroup]:
    """The cgroups, of either version, that bound this process by `controller`: its own first, then their ancestors."""
    try:
        own = [line.split(":", 2) for line in (PROC / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (PROC / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for fields in mounts:
        kind, _, options = fields[fields.index("-") + 1 :][:3]
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        wanted = "" if kind == "cgroup2" else controller
        root, point = PurePosixPath(fields[3]), Path(fields[4])
        for _, names, path in own:
            if wanted in names.split(","):
                yield from map(_Cgroup, _upwards(point, root, PurePosixPath(path)))


def _upwards(point: Path, root: PurePosixPath, path: PurePosixPath) -> Iterator[Path]:
    """The directory of cgroup `path` in a hierarchy whose cgroup `root` is mounted at `point`, and those above it."""
    inside = path.relative_to(root).parts if path.is_relative_to(root) else ()
    for length in range(len(inside) if ".." not in inside else 0, -1, -1):
        yield point.joinpath(*inside[:length])
