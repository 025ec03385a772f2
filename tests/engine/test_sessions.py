"""A sequence that is saved and resumed goes on as if the process had never ended; what is damaged is refused."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.engine.engine import Engine
from flashrt.engine.runtime import CpuRuntime
from flashrt.errors import SessionError, UsageError
from flashrt.kv.cache import KINDS
from flashrt.kv.contiguous import ContiguousStore
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

CONTEXT = 1400
FAMILIES = {  # windows that have slid by the end of the prompt, an item type each
    "llama-yarn": (Codec.INT8, {}),
    "gemma3": (Codec.INT8, {"sliding_window": 40}),
    "mistral": (Codec.F32, {"sliding_window": 13}),
    "qwen2-window": (Codec.INT4, {"sliding_window": 300}),
    "qwen3_moe": (Codec.BF16, {}),
}
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 931).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, tmp_path_factory) -> Pack:
    codec, options = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    _, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", 3, max_position_embeddings=4096, **options)
    return make_pack(checkpoint, root / "pack", codec)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Pack:
    root = tmp_path_factory.mktemp("plain")
    _, checkpoint = tiny_checkpoint("gemma3", root / "checkpoint", 3, max_position_embeddings=4096, sliding_window=40)
    return make_pack(checkpoint, root / "pack", Codec.INT8)


def engine_of(packed: Pack, kinds=KINDS, **options) -> Engine:
    return tiny_engine(packed, 1.0, CpuRuntime(2, kinds), **{"context": CONTEXT, "max_draft_tokens": 8} | options)


def text_of(engine: Engine, prompt: list[int], new: int, **options) -> list[int]:
    generation = engine.generate(prompt, new, ignore_eos=True, **options)
    list(generation)
    return generation.report.token_ids


@pytest.mark.parametrize("cut", [0, 1, 60, 112, 113, 700])
def test_a_resumed_sequence_goes_on_as_the_one_that_was_saved(packed, tmp_path, cut):
    """Whatever holds it: more context and longer passes, or a store for all positions where there was one for some."""
    with engine_of(packed, chunk=64) as engine:
        answer = text_of(engine, PROMPT, 20)
        engine.save(tmp_path / "saved")
        tokens, top = list(engine.sequence.tokens), engine.sequence.kv.top
        longer = [*tokens[: len(tokens) - cut], 7, 8, 9, 10]
        expected = text_of(engine, longer, 30, reuse=True)
        bits = engine.runner.prefill(engine.sequence, [*longer, 5]).copy()
        kept = engine.generate(longer, 1, reuse=True)
        list(kept)
    for kinds, context, chunk in ((KINDS, CONTEXT, 64), ((ContiguousStore,), CONTEXT + 300, 16), (KINDS, 4096, 512)):
        with engine_of(packed, kinds, context=context, chunk=chunk) as engine:
            assert engine.resume(tmp_path / "saved") is None
            assert engine.sequence.tokens == tokens
            assert (engine.sequence.length, engine.sequence.kv.top) == (len(tokens), top)
            generation = engine.generate(longer, 30, ignore_eos=True, reuse=True)
            assert [token.id for token in generation][-1] == expected[-1]
            assert generation.report.token_ids == expected
            assert np.array_equal(engine.runner.prefill(engine.sequence, [*longer, 5]), bits)
    assert answer
