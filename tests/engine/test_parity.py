"""Every family against transformers, streamed and resident, bit for bit between the two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, back_to, logits_of, make_pack, relative_rms, tiny_engine
from tests.families import FAMILIES, VOCAB, tiny_checkpoint

STEPS = 32


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(model, pack, prompt, tokens) of one family."""
    root = tmp_path_factory.mktemp(request.param)
    model, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=3)
    packed = make_pack(checkpoint, root / "pack", Codec.F32)
    random = np.random.default_rng(5)
    prompt = random.integers(3, VOCAB, 29).tolist()
    tokens = random.integers(3, VOCAB, STEPS).tolist()
    return model, packed, prompt, tokens


@pytest.fixture(params=["native", "reference"])
def runtime(request):
    """The native kernels, or the same engine forced onto the reference's."""
    return None if request.param == "native" else TorchRuntime()


def expected_logits(model, prompt, tokens):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0]
    return logits[len(prompt) - 1 :].numpy()


@pytest.mark.parametrize("prompt_tokens", [29, 9])  # a wide prefill and a narrow one
def test_logits_equal_transformers_streamed_and_resident(case, runtime, prompt_tokens):
    model, packed, prompt, tokens = case
    prompt = prompt[:prompt_tokens]
    results = {}
    for share in (0.35, 1.0):
        with tiny_engine(packed, share, runtime, chunk=16) as engine:
            if share < 1:
                assert engine.plan.pinned_bytes < 0.9 * engine.plan.weight_bytes
                assert not engine.plan.resident
            results[share] = logits_of(engine, prompt, tokens)
            if share < 1:
                assert engine.reader.bytes_read > engine.plan.weight_bytes
    assert relative_rms(results[1.0], expected_logits(model, prompt, tokens)) < 1e-4
    assert np.array_equal(results[0.35], results[1.0])


def test_chunks_do_not_change_the_bits(case):
    _, packed, prompt, tokens = case
    results = []
    for chunk in (16, 32):
        with tiny_engine(packed, 1.0, chunk=chunk) as engine:
            assert engine.plan.prefill_chunk == chunk
            results.append(logits_of(engine, prompt, tokens[:2]))
    assert np.array_equal(*results)


def test_batch_equals_single_steps_and_rewind(case):
    _, packed, prompt, tokens = case
    with tiny_engine(packed, 0.35, logit_rows=16) as engine:
        single = logits_of(engine, prompt, tokens[:16])
        for size in (2, 5, 16):
            back_to(engine, prompt)
            batch = engine.runner.step_batch(engine.sequence, tokens[:size])
            assert np.array_equal(batch, single[1 : 1 + size])


@pytest.mark.parametrize("dtype", [Codec.BF16, Codec.INT8, Codec.INT4])
def test_quantized_packs_do_not_depend_on_the_budget(tmp_path, runtime, dtype):
    _, checkpoint = tiny_checkpoint("qwen3_moe", tmp_path / "checkpoint", seed=4)
    packed = make_pack(checkpoint, tmp_path / "pack", dtype)
    random = np.random.default_rng(6)
    prompt, tokens = random.integers(3, VOCAB, 23).tolist(), random.integers(3, VOCAB, 8).tolist()
    results = []
    for share in (0.2, 0.6, 1.0):
        with tiny_engine(packed, share, runtime, chunk=16) as engine:
            results.append(logits_of(engine, prompt, tokens))
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[2])


def test_scores_equal_transformers(case, runtime):
    model, packed, prompt, _ = case
    text = prompt + prompt[::-1]
    with tiny_engine(packed, 0.35, runtime, chunk=16, scoring=True) as engine:
        prefix = engine.tokenizer.encode("")
        window = len(text) // 2 + len(prefix)
        perplexity, count = engine.score(text, window)
        decoded, _ = engine.score(text, window, as_decoded=True)
    total = 0.0
    for part in (text[: len(text) // 2], text[len(text) // 2 :]):
        ids = torch.tensor([prefix + part])
        with torch.no_grad():
            logits = model(ids).logits[0].double().log_softmax(-1)
        total -= float(logits[:-1].gather(1, ids[0, 1:, None]).sum())
    assert count == 2 * (len(text) // 2 + len(prefix) - 1)
    assert perplexity == pytest.approx(np.exp(total / count), rel=1e-4)
    assert decoded == pytest.approx(np.exp(total / count), rel=1e-4)
