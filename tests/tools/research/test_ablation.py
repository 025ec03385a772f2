"""The ablation of sparse mode by row, at toy size: every step reads what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashrt.calibration.pipeline import Request, calibrate
from flashrt.engine.options import LoadOptions
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint
from tests.tools.support import run_tool
from tools.research.ablation import order_of

TEXT = "the thing and the ring are in the inn, and another thing is in the ring. " * 40


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ablation")
    _, checkpoint = tiny_checkpoint("opt", root / "checkpoint", ffn_dim=700)
    make_pack(checkpoint, root / "pack", Codec.INT8)
    request = Request(max_loss=0.9, text=TEXT, tokens=1024)
    calibrate(root / "pack", LoadOptions(cache_dir=root / "cache", threads=1), request, lambda *_: None)
    return root / "pack"


def test_steps(pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ("--text-file", text, "--tokens", "24", "--threads", "1")
    found = run_tool("tools.research.ablation", tmp_path / "out", pack, *options)
    steps = {step["name"]: step for step in found["samples"]}
    assert list(steps) == ["naive", "resident", "predictor", "window", "order", "lookahead"]
    neurons = 3 * 700 * Pack(pack).layout.tensors["0.ffn"].stride
    assert neurons <= steps["naive"]["bytes_read"] < 1.1 * neurons
    assert steps["resident"]["bytes_read"] < 0.6 * steps["naive"]["bytes_read"]
    assert 0 < steps["window"]["hit_rate"] < 1
    assert 0 < steps["order"]["hit_rate"] <= 1
    assert steps["lookahead"]["hit_rate"] == pytest.approx(steps["order"]["hit_rate"], abs=0.1)
    assert steps["lookahead"]["bytes_read"] > 0.8 * steps["order"]["bytes_read"]
    assert 0 < steps["lookahead"]["recall"] <= 1
    assert 0 < steps["lookahead"]["precision"] <= 1
    assert all(step["io_ms"] > 0 and step["tok_per_s"] > 0 for step in steps.values())


def test_the_order_is_found_again(pack: Path) -> None:
    order = order_of(Pack(pack), Pack(pack / "sparse"), 1)
    assert sorted(order) == list(range(700))
    assert not np.array_equal(order, np.arange(700))
