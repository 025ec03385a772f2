"""The GPU's engine, run by torch on the CPU: the same logits as the native one, from every mixture of tiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, logits_of, make_pack, relative_rms, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

FAMILIES = ("qwen3", "qwen3_5_text", "gemma3", "opt", "mixtral", "llama-fatrelu", "deepseek_v3")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_native_engine(tmp_path, family, name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dense = {"first_k_dense_replace": 3} if family == "deepseek_v3" else {}  # so that passes read all weights
    _, checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", seed=7, **dense)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.F32)
    random = np.random.default_rng(8)
    prompt, tokens = random.integers(3, VOCAB, 21).tolist(), random.integers(3, VOCAB, 6).tolist()
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        expected = logits_of(engine, prompt, tokens)
    results = []
    for share, host_share in ((0.3, 0.0), (0.3, 0.3), (0.0, 1.0), (1.0, 0.0)):
        with tiny_engine(packed, share, TorchRuntime(name, host_share), chunk=16) as engine:
            before = engine.reader.bytes_read
            results.append(logits_of(engine, prompt, tokens))
            streamed = engine.reader.bytes_read - before
            assert (streamed < 0.5 * engine.plan.weight_bytes) == (share + host_share >= 1.0)
    for result in results:
        assert relative_rms(result, expected) < 1e-4
        assert np.array_equal(result, results[0])
