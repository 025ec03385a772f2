"""Mixtures with a cache far too small: transformers' logits, and the same bits whatever the cache does."""

from __future__ import annotations

import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from flashrt.budget.claims.experts import ExpertTier
from flashrt.cache.experts import ExpertCache
from flashrt.engine.build import build_engine, load_tokenizer
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import runtime_for
from flashrt.errors import DiskError
from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, logits_of, make_pack, relative_rms, tiny_engine, tiny_plan
from tests.families import VOCAB, tiny_checkpoint

STEPS = 24


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def case(request, tmp_path_factory):
    """(model, pack, prompt, tokens, logits of the pack when it is resident) of one family."""
    root = tmp_path_factory.mktemp(request.param)
    model, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=11)
    packed = make_pack(checkpoint, root / "pack", Codec.F32)
    rng = np.random.default_rng(12)
    prompt, tokens = rng.integers(3, VOCAB, 29).tolist(), rng.integers(3, VOCAB, STEPS).tolist()
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        return model, packed, prompt, tokens, logits_of(engine, prompt, tokens)


def cached_engine(packed, slots, runtime=None, **workload) -> Engine:
    """An engine with a cache of `slots` experts, fewer than the planner would allow."""
    runtime = runtime or runtime_for("cpu", threads=2)
    plan = tiny_plan(packed, runtime, 0.35, chunk=16, **workload)
    tier = plan.tier(ExpertTier)
    assert tier.experts >= slots
    fewer = replace(plan, tiers=plan.tiers | {"experts": (replace(tier, experts=slots),)})
    return build_engine(packed, fewer, load_tokenizer(packed), runtime)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_logits_equal_transformers(case, slots):
    model, packed, prompt, tokens, resident = case
    with torch.no_grad():
        expected = model(torch.tensor([prompt + tokens])).logits[0][len(prompt) - 1 :].numpy()
    with cached_engine(packed, slots) as engine:
        loaded = engine.reader.bytes_read
        result = logits_of(engine, prompt, tokens)
        assert engine.reader.bytes_read - loaded > engine.plan.weight_bytes
        engine.runner.decoder.ffns.kinds[0].store.check_integrity()
        counts = engine.ffn_counts()
    assert relative_rms(result, expected) < 1e-4
    assert np.array_equal(result, resident)
    assert counts["misses"] > 0
    assert 0 <= counts["useful"] <= counts["prefetched"]


@pytest.mark.parametrize("size", [2, 5, 16])
def test_batches_equal_single_tokens(case, size):
    _, packed, prompt, tokens, resident = case
    with cached_engine(packed, 3, logit_rows=16) as engine:
        engine.runner.prefill(engine.sequence, prompt)
        assert np.array_equal(engine.runner.step_batch(engine.sequence, tokens[:size]), resident[1 : 1 + size])
        engine.runner.decoder.ffns.kinds[0].store.check_integrity()


def test_looking_ahead_changes_no_bit(case, monkeypatch):
    _, packed, prompt, tokens, resident = case
    monkeypatch.setattr(ExpertCache, "looks_ahead", False)
    with cached_engine(packed, 3) as engine:
        assert np.array_equal(logits_of(engine, prompt, tokens), resident)
        assert engine.ffn_counts()["prefetched"] == 0


@pytest.mark.parametrize("host_share", [0.0, 0.5])
def test_torch(case, host_share):
    """The GPU's reads into place, from disk and from the host tier, on the CPU."""
    _, packed, prompt, tokens, _ = case
    with tiny_engine(packed, 1.0, TorchRuntime(), chunk=16) as engine:
        resident = logits_of(engine, prompt, tokens)
    for slots in (2, 4):
        with cached_engine(packed, slots, TorchRuntime(host_share=host_share)) as engine:
            assert np.array_equal(logits_of(engine, prompt, tokens), resident)
            engine.runner.decoder.ffns.kinds[0].store.check_integrity()


@pytest.mark.parametrize("make_runtime", [lambda: None, TorchRuntime], ids=["native", "torch"])
def test_a_failed_read_leaves_the_cache_usable(case, make_runtime, monkeypatch):
    _, packed, prompt, tokens, _ = case
    with cached_engine(packed, 3, make_runtime()) as engine:
        expected = logits_of(engine, prompt, tokens)
        submit, reads = engine.reader.submit, iter(range(10**9))

        def failing(block, buffer):
            if next(reads) % 7 == 6:
                raise DiskError("the disk is gone")
            return submit(block, buffer)

        monkeypatch.setattr(engine.reader, "submit", failing)
        for _ in range(5):
            with pytest.raises(DiskError, match="the disk is gone"):
                logits_of(engine, prompt, tokens)
            engine.runner.decoder.ffns.kinds[0].store.check_integrity()
        monkeypatch.undo()
        assert np.array_equal(logits_of(engine, prompt, tokens), expected)


@pytest.mark.parametrize("make_runtime", [lambda: None, TorchRuntime], ids=["native", "torch"])
def test_an_interrupt_leaves_the_cache_usable(case, make_runtime):
    _, packed, prompt, tokens, _ = case
    moments = random.Random(0)

    def strike(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, strike)
    try:
        with cached_engine(packed, 3, make_runtime()) as engine:
            expected = logits_of(engine, prompt, tokens)
            for _ in range(25):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-4 + 0.05 * moments.random())
                    logits_of(engine, prompt, tokens)
                except KeyboardInterrupt:
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
                engine.runner.decoder.ffns.kinds[0].store.check_integrity()
            assert np.array_equal(logits_of(engine, prompt, tokens), expected)
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_report_says_how_the_cache_did(case):
    _, packed, prompt, _, _ = case
    with cached_engine(packed, 3) as engine:
        generation = engine.generate(prompt, 6, ignore_eos=True)
        for _ in generation:
            pass
        figures = generation.report.to_json()["expert_cache"]
    mixtures = [layer.ffn for layer in packed.spec.layers if layer.ffn.experts]
    assert figures["hits"] + figures["misses"] == 5 * sum(ffn.experts_per_token for ffn in mixtures)
    assert figures["hit_rate"] == figures["hits"] / (figures["hits"] + figures["misses"])
    assert figures["prefetched"] > 0
    assert 0 <= figures["prefetch_accuracy"] <= 1
    with tiny_engine(packed, 1.0) as engine:
        generation = engine.generate(prompt, 2)
        generation.close()
        assert generation.report.ffn["expert_cache"] is None
