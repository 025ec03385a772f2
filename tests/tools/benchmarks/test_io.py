"""The I/O benchmark at toy size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tools.support import run_tool


@pytest.mark.parametrize("backend", ["", "pread"])
def test_it_measures_and_says_so(tmp_path: Path, backend: str) -> None:
    data = tmp_path / "data"
    data.write_bytes(np.random.default_rng(0).bytes(4 << 20))
    found = run_tool(
        "tools.benchmarks.io", tmp_path / "out", data,
        *("--blocks", "4096", "65536", "--depths", "1", "4", "--repeat", "2", "--seconds", "0.01", "--plain"),
        *("--backend", backend),
    )  # fmt: skip
    blocks = [sample for sample in found["samples"] if "order" in sample]
    rows = [sample for sample in found["samples"] if "row_bytes" in sample]
    assert len(blocks) == 2 * 8
    assert len(rows) == 2 * 9
    for sample in found["samples"]:
        assert sample["ratio"] == sample["bytes_per_s"] / sample["reference_bytes_per_s"] > 0
    assert all(0 < sample["useful"] <= 1 and sample["time_over_unmerged"] > 0 for sample in rows)
    if backend:
        assert found["parameters"]["backend"] == backend
