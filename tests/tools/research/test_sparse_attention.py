"""What sparse attention loses, at toy size: one engine says for every share what an engine of its own says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flashrt.calibration.kv_losses import Dial, after_prompt, dialled
from flashrt.kv.choice import Choice, SparseKv
from flashrt.storage.kv_labels import write_labels
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint
from tests.kv.support import random_labels, spec_labels
from tests.tools.support import run_tool
from tools.research.selectors import Bounds, Keys, Recent
from tools.research.sparse_attention import wilson

KEEPS = (1.0, 1 / 4, 1 / 32)
TEXT = "the thing and the ring are in the inn, and another thing is in the ring. "


@pytest.fixture
def packed(tmp_path: Path) -> Pack:
    return make_pack(tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3)[1], tmp_path / "pack", Codec.F32)


@pytest.mark.usefixtures("few")
def test_one_engine_measures_every_share(packed: Pack) -> None:
    ids, labels, dial = np.random.default_rng(7).integers(3, VOCAB, 200).tolist(), spec_labels(packed.spec), Dial()
    options = {"context": 240, "chunk": 64, "scoring": True}
    with tiny_engine(packed, 1.0, kv=dialled(labels, dial), **options) as engine:
        found = []
        for dial.keep in (*KEEPS, *KEEPS):
            found.append(after_prompt(engine, ids, 150))
    assert found[:3] == found[3:], "no share leaves anything behind"
    assert len(set(found)) == 3
    for keep, expected in zip(KEEPS, found, strict=False):
        with tiny_engine(packed, 1.0, kv=SparseKv.of(labels, keep), **options) as engine:
            assert after_prompt(engine, ids, 150) == expected


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashrt.kv.choice.LEAST", 8)


def test_others_choose_as_many_by_what_they_say() -> None:
    random = np.random.default_rng(1)
    choice = Choice(random_labels(2, 12, 3), 8, (1 / 8, 1 / 4))
    index = SimpleNamespace(_choice=choice, leaves_out=lambda *_: True)
    keys = random.standard_normal((2, 400, 12)).astype(np.float32)
    queries = random.standard_normal((2, 6, 12)).astype(np.float32)
    bounds, last, exact = Bounds(index, 0.5), Recent(index), Keys(index, 0.5)  # type: ignore[arg-type]
    for start in (100, 320, 311):  # the last one was cut back
        for own in (bounds, exact):
            own.begin(start, lambda begin, end: keys[:, begin:end])
    positions = [311, 312]
    for own in (bounds, last, exact):
        chosen = np.zeros((2, 2, choice.most(400)), np.int32)
        counts = own.choose(queries, positions, slice(0, 2), chosen, np.empty(0))
        for t, position in enumerate(positions):
            end = choice.end(position)
            for h in range(2):
                kept = choice.kept(position, h)
                if own is last:
                    expected = list(range(end - kept, end))
                elif own is exact:
                    weights = block_weights(queries[t, 3 * h : 3 * h + 3], keys[h], end)
                    expected = sorted(sorted(range(1, end), key=lambda b, w=weights: -w[b])[:kept])
                else:
                    weights = page_weights(queries[t, 3 * h : 3 * h + 3], keys[h], end)
                    expected = sorted(sorted(range(1, end), key=lambda b, w=weights: -w[b // 2])[:kept])
                assert counts[t, h] == kept
                assert chosen[t, h, :kept].tolist() == expected


def block_weights(queries: np.ndarray, keys: np.ndarray, end: int) -> np.ndarray:
    """What the softmax over all candidates puts on each block of 8, summed over the queries."""
    weights = np.zeros(end)
    for query in queries.astype(np.float64):
        scores = np.exp(0.5 * (keys[8 : 8 * end].astype(np.float64) @ query))
        weights[1:] += (scores / scores.sum()).reshape(-1, 8).sum(axis=1)
    return weights


def page_weights(queries: np.ndarray, keys: np.ndarray, end: int) -> np.ndarray:
    """By a loop over all pages that blocks of 8 before `end` lie in."""
    weights = np.zeros(-(-end // 2))
    for query in queries.astype(np.float64):
        scores = np.zeros(len(weights))
        for page in range(len(weights)):
            own = keys[16 * page : 16 * page + 16].astype(np.float64)
            scores[page] = sum(max(q * own[:, d].min(), q * own[:, d].max()) for d, q in enumerate(query))
        weights += np.exp(0.5 * scores) / np.exp(0.5 * scores).sum()
    return weights


def test_it_runs(tmp_path: Path) -> None:
    _, checkpoint = tiny_checkpoint("qwen2", tmp_path / "checkpoint", seed=3, max_position_embeddings=2048)
    pack = make_pack(checkpoint, tmp_path / "pack", Codec.INT4)
    labels = replace(spec_labels(pack.spec, 8), base=pack.manifest.hash, losses={"1/16": 0.01})
    write_labels(pack.path, labels, pack.spec)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 150)
    options = ("--ways", "labels=1/16", "recent=1/16", "bounds=1/16")
    tool = "tools.research.sparse_attention"
    lengths = ("--window", 1100, "--prompt", 1000)
    found = run_tool(tool, tmp_path / "out", "perplexity", pack.path, "--text-file", text, *lengths, *options)
    exact, *others = found["samples"]
    assert (exact["rise"], exact["error"], exact["tokens"]) == (0, 0, 99)
    assert [sample["choose"] for sample in others] == ["labels", "recent", "bounds"]
    assert len({sample["ppl"] for sample in found["samples"]}) == 4
    lengths = ("--lengths", 1100, "--needles", 2, "--samples", 1)
    found = run_tool(tool, tmp_path / "out", "retrieval", pack.path, *lengths, *options)
    assert [sample["questions"] for sample in found["samples"]] == [2] * 8


def test_intervals() -> None:
    assert wilson(50, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert wilson(100, 100) == pytest.approx((0.963, 1.0), abs=1e-3)
