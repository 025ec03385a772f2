"""The benchmark of long contexts, at toy size, and the keys and values that it fills them with."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.engine.engine import Engine
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint
from tests.tools.support import run_tool, tiny_pack
from tools.benchmarks import longctx
from tools.benchmarks.kv_sample import SINKS, KvSample, fill, record

TEXT = "the thing and the ring are in the inn, and another one is on the handle. " * 20
TOKENS = 307  # recorded
CONTEXT = 701
GIVEN = Namespace(budget="1.5", threads=2)


def test_longctx(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--context", 300, 800, "--steps", 3, "--repeat", 2, "--text", tmp_path / "text.txt")
    ways = ("--text-tokens", 290, "--threads", 2, "--a", "--b", "device=cpu", "mode=exact")
    found = run_tool("tools.benchmarks.longctx", tmp_path / "out", tiny_pack(tmp_path), *options, *ways)
    labels = [(sample["context"], sample["way"], sample["options"]) for sample in found["samples"]]
    a, b = ("a", ""), ("b", "device=cpu mode=exact")
    assert labels == [(context, *way) for context in (300, 800) for way in (a, b, b, a)]
    for sample in found["samples"]:
        assert len(sample["step_s_all"]) == 3
        assert sample["decode_tok_per_s"] == pytest.approx(3 / sum(sample["step_s_all"]))
        assert sample["context_s"] == sample["step_s"] - sample["short_step_s"]
        assert sample["bytes_read_per_token"] == 0
        assert 0 < sample["peak_rss_bytes"] <= sample["budget_bytes"]
    figures, over = found["summary"]["tables"]
    assert [row[:2] for row in figures["rows"]] == [[c, w] for c in (300, 800) for w in (a[1], b[1])]
    assert [row[:2] for row in over["rows"]] == [[300, b[1]], [800, b[1]]]
    assert over["rows"][0][2]["count"] == 2


def test_llama_cpp_takes_turns(tmp_path: Path) -> None:
    """With a stand-in, which says what it was asked for."""
    (tmp_path / "text.txt").write_text(TEXT)
    stand_in = tmp_path / "peers" / "llama.cpp" / "bin" / "python"
    stand_in.parent.mkdir(parents=True)
    figures = '"decode_tok_per_s": 2.0, "step_s": 0.5, "short_step_s": 0.1, "context_s": 0.4'
    stand_in.write_text(f"#!/bin/sh\necho '{{{figures}, \"asked\": \"'$*'\"}}'\n")
    stand_in.chmod(0o755)
    options = ("--context", 300, "--steps", 2, "--repeat", 1, "--text", tmp_path / "text.txt", "--threads", 1)
    peers = ("--gguf", tmp_path / "model.gguf", "--peers", tmp_path / "peers")
    (tmp_path / "out").mkdir()
    pack = tiny_pack(tmp_path / "model")
    found = run_tool("tools.benchmarks.longctx", tmp_path / "out" / "x", pack, *options, *peers)
    assert [sample["way"] for sample in found["samples"]] == ["a", "llama.cpp, on", "llama.cpp, off"]
    own, on, off = found["samples"]
    assert on["asked"].endswith("--threads 1 --steps 2 --flash-attention on --context 300")
    assert off["asked"].endswith("--flash-attention off --context 300")
    row = found["summary"]["tables"][1]["rows"][0]
    assert row[:2] == [300, "llama.cpp --flash-attention on"]
    assert row[2]["median"] == 2.0 / own["decode_tok_per_s"]


@pytest.mark.parametrize("words", [["mode"], ["budget_gb=1"], ["nonsense=1"], ["max_loss=2"], ["mode=fast"]])
def test_what_is_no_option_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match=words[0].partition("=")[0]):
        longctx.load_options(words, GIVEN)


def test_options_are_those_of_loading() -> None:
    options = longctx.load_options(["max_loss=0.03", "mode=sparse"], GIVEN)
    assert (options.threads, options.max_loss, options.mode, options.budget_gb) == (2, 0.03, "sparse", 1.5)


class Recorded:
    """An engine, and a text that was recorded from its pack."""

    def __init__(self, engine: Engine, sample: KvSample) -> None:
        self.engine, self.sample = engine, sample


@pytest.fixture(scope="module", params=["llama", "gemma3", "opt"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder: Path = tmp_path_factory.mktemp(request.param)
    _, checkpoint = tiny_checkpoint(request.param, folder / "checkpoint", max_position_embeddings=CONTEXT + 8)
    packed = make_pack(checkpoint, folder / "pack", Codec.F32)
    record(folder / "pack", TEXT, TOKENS, folder)
    with tiny_engine(packed, 1, context=CONTEXT + 8, chunk=128) as engine:
        yield Recorded(engine, KvSample(folder))


@pytest.mark.parametrize("length", [17, 99, 256, TOKENS])
def test_as_far_as_the_text_goes_it_is_as_if_prefilled(recorded: Recorded, length: int) -> None:
    engine, ids = recorded.engine, recorded.sample.tokens
    assert len(ids) == TOKENS
    engine.sequence.rewind(0)
    engine.runner.prefill(engine.sequence, ids[:length])
    expected = engine.runner.step(engine.sequence, 9).copy()
    fill(engine, recorded.sample, length)
    assert engine.sequence.tokens == ids[:length]
    assert np.array_equal(engine.runner.step(engine.sequence, 9), expected)


def test_beyond_it_runs_of_the_text_stand_at_their_new_positions(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen in one layer, rotated here by complex numbers."""
    engine, sample = recorded.engine, recorded.sample
    appended: dict[int, Any] = {}
    store = engine.sequence.kv.stores[1]
    append = store.append

    def watch(key: Any, value: Any, start: int) -> None:
        appended[start] = (np.array(key), np.array(value))
        append(key, value, start)

    monkeypatch.setattr(store, "append", watch)
    fill(engine, sample, CONTEXT)
    assert engine.sequence.length == len(engine.sequence.tokens) == CONTEXT
    assert sorted(appended) == list(range(0, CONTEXT, engine.plan.prefill_chunk))
    attention, layer = engine.spec.layers[1].attention, sample.layer(1).swapaxes(0, 1)
    half, moves = attention.head_dim // 2, set()
    for start, (key, value) in appended.items():
        count = len(value)
        (source,) = (s for s in range(TOKENS) if np.array_equal(layer[s : s + count, :, 1], value))
        assert source == start if start + count <= TOKENS else source >= SINKS
        assert engine.sequence.tokens[start : start + count] == sample.tokens[source : source + count]
        moves.add(start - source)
        own = layer[source : source + count, :, 0]
        moved = own[..., :half] + 1j * own[..., half:]
        if attention.rope is not None:
            moved = moved * np.exp(1j * (start - source) * np.array(attention.rope.inverse_frequencies(2 * half)))
        np.testing.assert_allclose(key, np.concatenate([moved.real, moved.imag], -1), atol=1e-4)
    assert len(moves) == 5, "the first two are the text's own"
    assert np.isfinite(engine.runner.step(engine.sequence, 9)).all()


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="the text has 5 tokens"):
        record(tiny_pack(tmp_path), "abcd", 1024, tmp_path)
