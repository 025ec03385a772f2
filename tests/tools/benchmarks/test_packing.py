"""The benchmark of packing and starting, at toy size."""

from __future__ import annotations

from pathlib import Path

from flashrt.storage.sources import open_checkpoint
from tests.tools.support import run_tool
from tools.benchmarks import page
from tools.make_random_checkpoint import make


def test_packing(tmp_path: Path) -> None:
    make(tmp_path / "tiny", layers=2, hidden=256, neurons=320, seed=1)
    found = run_tool(
        "tools.benchmarks.packing", tmp_path / "out", tmp_path / "tiny", "--dtypes", "int4", "--starts", "1"
    )
    assert [sample["what"] for sample in found["samples"]] == ["pack", "cold", "warm"]
    packed = found["samples"][0]
    assert packed["bytes_per_s"] > 0
    assert packed["bytes_per_s_alone"] > 0
    assert {"wall_s", "cpu_s", "load_s", "ttft_s"} <= set(found["samples"][1])
    section = page.section("packing-toy", found)
    assert "| tiny | int4 | this | warm |" in section


def test_random_checkpoints_are_ones(tmp_path: Path) -> None:
    """Each layer in a file of its own, weights of the scale of trained ones."""
    make(tmp_path / "tiny", layers=3, hidden=256, neurons=320, seed=2)
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) == 4
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        checkpoint.validate()
        gate, _, down = checkpoint.neuron_rows("1.ffn", 0, 0, 320)
        assert gate is not None
        for rows, columns in ((gate, 256), (down, 320)):
            assert 0.8 < rows.std() * columns**0.5 < 2
        assert len(checkpoint.files_behind(1)) == 1
