"""What this process holds and may use: resident memory, cores, limits. Read from the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def resident_bytes() -> int:
    """Resident set of this process now, file-backed pages included."""
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    """Largest resident set that this process has had."""
    return _status("VmHWM")


def available_bytes() -> int:
    """Memory that this process may still take: what the machine has available, cut by a cgroup limit."""
    with open("/proc/meminfo") as meminfo:
        fields = dict(line.split(":") for line in meminfo)
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_cgroup_left()])


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
    cores = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    return max(1, min(cores, int(quota + 0.5))) if quota else cores


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _cgroup_cores() -> float | None:
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            fields = Path(quota_file).read_text().split()
            period = Path(period_file).read_text() if period_file else fields[1]
            if fields[0] not in ("max", "-1"):
                return int(fields[0]) / int(period)
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue
    return None


def _cgroup_left() -> list[int]:
    """What the cgroups of this process leave it, for those with a limit."""
    left = []
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            left.append(max(int(Path(limit_file).read_text()) - int(Path(usage_file).read_text()), 0))
        except (OSError, ValueError):  # absent, or 'max'
            continue
    return left
