"""Engines that choose of keys and values on disk: the texts of those that hold everything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashrt.engine.engine import Engine
from flashrt.kv.choice import SparseKv
from flashrt.kv.chosen import ChosenStore
from flashrt.kv.streamed import StreamedStore
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.engine.test_streamed_kv import PROMPT, _cache, text_of  # noqa: F401
from tests.families import tiny_checkpoint
from tests.kept import CASES, keep
from tests.kv.support import spec_labels

CONTEXT = 16000
KEEP = 1 / 16


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Texts of tiny models are shorter than what every row attends to at least."""
    monkeypatch.setattr("flashrt.kv.choice.LEAST", 64)


def make(family: str, root: Path, codec: Codec = Codec.INT8) -> Pack:
    options = {"max_position_embeddings": 16384} | ({"head_dim": 32} if family == "gemma3" else {})
    _, checkpoint = tiny_checkpoint(family, root / "checkpoint", seed=3, **options)
    return make_pack(checkpoint, root / "pack", codec)


def engines(packed: Pack, share: float, **options: object) -> tuple[Engine, Engine]:
    """One that holds all keys and values, and one that has them on disk."""
    kv = SparseKv.of(spec_labels(packed.spec, block=8), KEEP)
    whole = tiny_engine(packed, 1.0, context=CONTEXT, kv=kv)
    far = tiny_engine(packed, share, stream_kv=True, **{"context": CONTEXT, "kv": kv, "chunk": 64, **options})
    assert any(isinstance(store, ChosenStore) for store in far.sequence.kv.stores)
    return whole, far


@pytest.mark.parametrize(
    ("family", "share", "draft"), [("llama", 0.1, 1), ("gemma3", 0.3, 12), ("qwen3", 1.4, 12), ("gpt_oss", 0.3, 12)]
)
def test_texts_are_those_of_an_engine_that_holds_everything(family, share, draft, tmp_path):
    packed = make(family, tmp_path)
    repeated = PROMPT[:50] * 20  # which drafts copy from
    whole, far = engines(packed, share, max_draft_tokens=draft)
    with whole, far:
        assert far.plan.owners["KV"] < whole.plan.owners["KV"]
        for prompt, new in ((PROMPT, 300), (repeated, 200), (PROMPT[:5], 700)):
            assert text_of(far, prompt, new) == text_of(whole, prompt, new)
        counts = far.kv_counts()
        assert counts["hits"] > 0
        assert counts["misses"] > 0
        if share > 1:
            assert counts["useful"] > 0


def test_a_conversation_that_is_cut_back_and_sessions(tmp_path):
    packed = make("llama", tmp_path, Codec.F32)
    whole, far = engines(packed, 0.5)
    with whole, far:
        for keep, new in ((1150, 70), (1149, 3), (700, 20), (520, 3), (513, 20), (512, 9), (256, 3), (40, 70)):
            text_of(far, PROMPT, 5, reuse=True)
            text_of(whole, PROMPT, 5, reuse=True)
            prompt = [*PROMPT[:keep], *PROMPT[20 : 20 + new]]
            assert text_of(far, prompt, 30, reuse=True) == text_of(whole, prompt, 30, reuse=True)
        expected = text_of(whole, PROMPT, 40)
        assert text_of(far, PROMPT, 40) == expected
        files = [tmp_path / "whole", tmp_path / "far"]
        for engine, file in zip((whole, far), files, strict=True):
            engine.save(file)
        longer, found = [*PROMPT, *expected, 7, 8, 9], []
        for engine, file in zip((whole, far), reversed(files), strict=True):
            engine.resume(file)
            found.append(text_of(engine, longer, 30, reuse=True))
        assert found[0] == found[1]


@pytest.mark.parametrize(("share", "chunk", "keep"), [(0.2, 64, KEEP), (1.4, 512, 0.5)])
def test_scores_are_the_same(tmp_path, share, chunk, keep):
    packed = make("qwen2", tmp_path)
    kv = SparseKv.of(spec_labels(packed.spec, block=8), keep)
    with (
        tiny_engine(packed, 1.0, context=CONTEXT, scoring=True, kv=kv) as whole,
        tiny_engine(packed, share, stream_kv=True, context=CONTEXT, scoring=True, kv=kv, chunk=chunk) as far,
    ):
        found = [engine.runner.score(engine.sequence, PROMPT, False) for engine in (whole, far)]
        assert found[0] == pytest.approx(found[1], rel=1e-14)  # summed in passes of other lengths


def test_layers_that_attend_to_everything_stream_beside_those_that_choose(tmp_path):
    packed = make("llama", tmp_path)
    labels = spec_labels(packed.spec, block=8)
    own = SparseKv.of(labels, KEEP)
    kv = SparseKv(KEEP, None, (None, *own.layers[1:]))
    with (
        tiny_engine(packed, 1.0, context=CONTEXT, kv=kv) as whole,
        tiny_engine(packed, 0.2, stream_kv=True, context=CONTEXT, kv=kv, chunk=64) as far,
    ):
        kinds = [type(store) for store in far.sequence.kv.stores]
        assert kinds == [StreamedStore] + [ChosenStore] * (len(kinds) - 1)
        assert text_of(far, PROMPT, 300) == text_of(whole, PROMPT, 300)


def test_an_interrupt_leaves_nothing_wrong_behind(tmp_path, monkeypatch):
    packed = make("llama", tmp_path)
    whole, far = engines(packed, 0.2)
    with whole, far:
        expected = text_of(whole, PROMPT, 60)
        fetch_parts, left = far.sequence.kv.stores[-1]._cells.fetch_parts, [7]

        def interrupted(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
            for slots in fetch_parts(parts):
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                yield slots

        monkeypatch.setattr(far.sequence.kv.stores[-1]._cells, "fetch_parts", interrupted)
        generation = far.generate(PROMPT, 60, ignore_eos=True)
        with contextlib.suppress(KeyboardInterrupt):
            list(generation)
        assert left[0] <= 0
        assert text_of(far, PROMPT, 60) == expected


def test_packs_whose_queries_and_keys_are_apart(tmp_path):
    """A guess needs the queries' matrix, which a pack that keeps a file's codecs may hold as three."""
    shape = CASES["plain"].shape | {"head_dim": 32, "max_position_embeddings": 16384}
    packed = keep(replace(CASES["plain"], shape=shape).write(tmp_path / "model.gguf"), tmp_path / "pack")
    assert len(packed.layout.parts("1.qkv")) > 1  # nothing is guessed for layer 0
    whole, far = engines(packed, 1.4)
    with whole, far:
        assert text_of(far, PROMPT, 60) == text_of(whole, PROMPT, 60)
        assert far.kv_counts()["ahead"] > 0
