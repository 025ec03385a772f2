"""Reads slowed down to the rate of another disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.benchmarks.harness.disk import BLKIO, disk_of, slow_disk
from tools.run_in_cgroup import CgroupUnavailable


def test_this_process_is_confined_and_set_free_again() -> None:
    own = f"flashrt-{os.getpid()}-*"
    try:
        with slow_disk(Path(__file__), 1.0):
            (cgroup,) = BLKIO.glob(own)
            limit = (cgroup / "blkio.throttle.read_bps_device").read_text().split()
            assert limit == [disk_of(Path(__file__)), "1000000000"]
            assert f"/{cgroup.name}\n" in Path("/proc/self/cgroup").read_text()
    except CgroupUnavailable as error:
        pytest.skip(str(error))
    assert not list(BLKIO.glob(own))
    assert "flashrt-" not in Path("/proc/self/cgroup").read_text()
