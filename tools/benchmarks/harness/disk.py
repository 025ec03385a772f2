"""The disk beneath a benchmark: its rate meanwhile, and a fast one made as slow as another."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flashrt.machine.disk import PLAIN_BYTES, PLAIN_DEPTH, sequential_rate
from tools.run_in_cgroup import CgroupUnavailable

BLKIO = Path("/sys/fs/cgroup/blkio")  # version 1, whose limits on disks hold beside those on memory
PLAIN_BLOCK = 4 << 20  # bytes of one read of the plain sequential read


def plain_rates(path: Path, limit: int = PLAIN_BYTES) -> dict[str, float]:
    """Bytes per second of reading a file in order around the page cache: one read in flight, and several."""
    return {
        "disk_plain_bytes_per_s": sequential_rate(path, limit, block=PLAIN_BLOCK),
        "disk_deep_bytes_per_s": sequential_rate(path, limit, block=PLAIN_BLOCK, depth=PLAIN_DEPTH),
    }


def disk_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--disk-gb-per-s", type=float, help="read no faster, whatever the disk can do (needs root)")


def disk_label(gb_per_s: float | None, rates: Mapping[str, float]) -> str:
    """What is said of the disk, with the rates that `plain_rates` found on it as it was."""
    held = f"The disk is held to {gb_per_s} GB/s" if gb_per_s else "The disk is as fast as it is"
    plain, several = (rates[f"disk_{way}_bytes_per_s"] / 1e9 for way in ("plain", "deep"))
    return f"{held}; plain reads get {plain:.2f} GB/s, several at once {several:.2f}."


@contextlib.contextmanager
def slow_disk(path: Path, gb_per_s: float | None) -> Iterator[None]:
    """This process and what it starts read at most so much from the disk that holds `path`; None: no limit.

    Raises CgroupUnavailable where there are no cgroups of version 1, or no right to make one.
    """
    if gb_per_s is None:
        yield
        return
    cgroup = BLKIO / f"flashrt-{os.getpid()}-{time.monotonic_ns()}"
    try:
        cgroup.mkdir()
        (cgroup / "blkio.throttle.read_bps_device").write_text(f"{disk_of(path)} {int(gb_per_s * 1e9)}")
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        raise CgroupUnavailable(f"reads of {path} cannot be slowed down: {error.strerror}") from None
    try:
        yield
    finally:
        for process in (cgroup / "cgroup.procs").read_text().split():  # this one, and helpers that it still has
            (BLKIO / "cgroup.procs").write_text(process)
        cgroup.rmdir()


@contextlib.contextmanager
def read_ahead(path: Path, kib: int | None) -> Iterator[int | None]:
    """Page faults on files of the disk that holds `path` read so much ahead; None: what they do. Gives what holds.

    128 is what Linux does by itself. Needs root where it is not None.
    """
    setting = Path("/sys/dev/block", disk_of(path), "queue", "read_ahead_kb")
    before = int(setting.read_text()) if setting.exists() else None
    if kib is None or before is None:
        yield before
        return
    setting.write_text(str(kib))
    try:
        yield kib
    finally:
        setting.write_text(str(before))


def disk_of(path: Path) -> str:
    """'major:minor' of the whole disk that holds `path`, which may be one of its partitions."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    entry = Path("/sys/dev/block", number).resolve()
    return (entry.parent / "dev").read_text().strip() if (entry / "partition").exists() else number
