"""What is known of a disk: measured quickly, kept, raised by faster runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashrt.machine.disk import (
    DiskProfile,
    DiskRoof,
    load_disk_profile,
    measure_disk,
    profile_path,
    save_disk_profile,
)
from flashrt.storage.reader import DEPTH

DEVICE = 7


def test_a_quick_profile_has_all_that_is_needed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(0).bytes(20 << 20))
    profile = measure_disk(data)
    assert profile is not None
    assert profile.sequential > 0
    assert profile.curve() is not None
    save_disk_profile(tmp_path, DEVICE, profile)
    assert load_disk_profile(tmp_path, DEVICE) == profile


def test_a_small_file_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    assert measure_disk(tmp_path / "data") is None


def test_the_curve_is_that_of_the_depth_in_use() -> None:
    rates = {f"4096/{DEPTH}": 1e8, f"65536/{DEPTH}": 1e9, "4096/1": 5e7}
    curve = DiskProfile(1e9, rates).curve()
    assert curve is not None
    assert curve.seconds(4096) == pytest.approx(4096 / 1e8)
    assert DiskProfile(1e9, {"4096/16": 1e8}).curve() is None
    assert DiskProfile(1e9).curve() is None


def test_a_faster_run_raises_the_roof(tmp_path: Path) -> None:
    roof = DiskRoof(tmp_path, DEVICE, DiskProfile(1e9, {"4096/1": 5e7}))
    assert roof.share(5e8) == 0.5
    assert load_disk_profile(tmp_path, DEVICE) is None
    assert roof.share(2e9) == 1
    assert roof.share(5e8) == 0.25
    assert load_disk_profile(tmp_path, DEVICE) == DiskProfile(2e9, {"4096/1": 5e7})


@pytest.mark.parametrize(
    "disk",
    [
        {"sequential": 0, "random": {}},
        {"sequential": 1e9, "random": {"4096": 1e8}},
        {"sequential": 1e9, "random": {f"4096/{DEPTH}": 0}},
        {"sequential": 1e9, "random": {f"4096/{DEPTH}": -1e8}},
        {"sequential": "fast", "random": {}},
    ],
)
def test_a_profile_that_makes_no_sense_counts_as_none(tmp_path: Path, disk: dict[str, object]) -> None:
    profile_path(tmp_path).write_text(json.dumps({"disks": {str(DEVICE): disk}}))
    assert load_disk_profile(tmp_path, DEVICE) is None
