"""A mixture beside llama.cpp, at toy size: the file is read as it was meant, and both systems are asked alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashrt_kernels.rows import Codec
from tests.tools.support import run_tool
from tools.benchmarks.harness.samples import only
from tools.make_synthetic_gguf import PRESETS, TOPICS, encoded

PRESET = "gpt-oss-20b"
TOY = ("--layers", "4", "--vocab", "400", "--experts", "12")


def test_mixtures(tmp_path: Path) -> None:
    stand_in = tmp_path / "peers" / "llama.cpp" / "bin" / "python"
    for folder in (stand_in.parent, tmp_path / "out", tmp_path / "files"):
        folder.mkdir(parents=True)
    figures = {"decode_tok_per_s": 2.0, "bytes_read_per_token": 1e6}
    stand_in.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{json.dumps(figures)}'\n")
    stand_in.chmod(0o755)
    options = ("--preset", PRESET, "--budget", "1", "--tokens", "30", "--repeat", "1", "--peers", tmp_path / "peers")
    found = run_tool("tools.benchmarks.mixtures", tmp_path / "out" / "x", tmp_path / "files", *TOY, *options)
    ours, theirs = (only(found["samples"], system=system)[0] for system in ("flashrt", "llama.cpp"))
    assert ours["decode_tok_per_s"] > 0
    assert theirs["decode_tok_per_s"] == 2.0
    assert found["parameters"]["file_bytes"] == (tmp_path / "files" / f"{PRESET}.gguf").stat().st_size
    assert "--no-repack" in (tmp_path / "asked").read_text()
    assert [row[0] for row in found["summary"]["tables"][0]["rows"]] == ["flashrt", "llama.cpp"]


@pytest.mark.slow
def test_drawn_text_stays_with_a_topic(tmp_path: Path) -> None:
    import flashrt
    from flashrt.config import Sampling
    from tools.make_synthetic_gguf import make, replace

    make(tmp_path / "x.gguf", replace(PRESETS["qwen3.5-35b-a3b"], layers=4, vocab=4096, experts=12))
    with flashrt.load(tmp_path / "x.gguf", 1.0, context=512, cache_dir=tmp_path / "cache") as engine:
        drawn = engine.generate("Experts", 300, Sampling(temperature=1.0, seed=1), ignore_eos=True)
        list(drawn)
    topics = np.array(drawn.report.token_ids) % TOPICS
    assert 0.85 < (topics[1:] == topics[:-1]).mean() < 0.99


def test_a_dense_model_is_read(tmp_path: Path) -> None:
    import flashrt
    from tools.make_synthetic_gguf import make, replace

    shape = replace(
        PRESETS["llama-70b"], layers=3, vocab=1024, hidden=512, neurons=768, heads=8, kv_heads=2, head_dim=64
    )
    make(tmp_path / "x.gguf", shape)
    with flashrt.load(tmp_path / "x.gguf", 1.0, context=128, cache_dir=tmp_path / "cache") as engine:
        assert len(list(engine.generate("Dense", 8, ignore_eos=True))) == 8
        stored = {tensor.codec for tensor in engine.runner.decoder.layout.tensors.values()}
        assert stored == {Codec.Q4_K, Codec.Q6_K}


def test_blocks_are_those_of_gguf_files() -> None:
    import gguf

    values = np.random.default_rng(0).standard_normal((7, 768), dtype=np.float32)
    for form in ("Q4_K", "Q6_K", "MXFP4", "Q8_0"):
        found = gguf.quants.dequantize(encoded(values, form), gguf.GGMLQuantizationType[form])
        assert np.corrcoef(found.ravel(), values.ravel())[0, 1] > 0.98
