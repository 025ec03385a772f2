"""The store that chooses: all bits where all is kept, what a plain model says where not, whoever shares a pass."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from flashrt.config import Sampling
from flashrt.engine.engine import Engine
from flashrt.kv.base import Kernels, KvLimits, KvRows
from flashrt.kv.cache import kv_bytes, open_cache
from flashrt.kv.choice import RECENT, Choice, SparseKv, labelled, recent
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.sparse import SparseStore
from flashrt.spec import Attention
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint
from tests.kv.support import attended, choice_of, random_rows, spec_labels

CONTEXT = 900
ATTENTION = Attention(heads=6, kv_heads=2, head_dim=20, scale=0.3)
TREE = [-1, -1, 0, 0, 1, 2, 2, 5, 7, 8, 9, 3, 10, 12, 4, 13]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Texts of tiny models are shorter than what every row attends to at least."""
    monkeypatch.setattr("flashrt.kv.choice.LEAST", 8)


def store(choice: Choice | None, codec: KvCodec = KvCodec.F32, attention: Attention = ATTENTION) -> ContiguousStore:
    kernels = ops.load("cpu")
    limits = KvLimits(CONTEXT, 64, choice, codec=codec)
    kind = ContiguousStore if choice is None else SparseStore
    heads = attention.heads, attention.kv_heads, attention.head_dim
    needed = max(kernels.attention_scratch_bytes(count, *heads) for count in range(1, 65))
    scratch = np.zeros(max(needed, kind.scratch_bytes(attention, limits, kernels)), np.uint8)
    return kind(attention, limits, Kernels(kernels, scratch), np.zeros)


def filled(own: ContiguousStore, length: int, seed: int = 1) -> None:
    """Append rows as prefill does."""
    _, key, value = random_rows(ATTENTION, length, seed)
    for begin in range(0, length, 50):
        own.append(key[begin : begin + 50], value[begin : begin + 50], begin)


def test_what_can_be_chosen_is_labelled_whatever_the_pass():
    for start in range(300):
        for position in range(start, start + NARROW_TOKENS):
            assert recent(position) <= labelled(start) <= max(start - NARROW_TOKENS, 0)
            assert recent(position) <= max(position - RECENT + 1, 0)


@pytest.mark.parametrize("codec", KvCodec)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_where_all_is_kept_the_bits_are_those_of_all_positions(codec, block):
    both = [store(None, codec), store(choice_of(ATTENTION, 1.0, block), codec)]
    random, length = np.random.default_rng(block), 0
    while length < CONTEXT - 80:
        step = int(random.integers(4))
        count = 50 if step == 0 else int(random.integers(1, 17))
        parents = np.asarray(TREE, np.int32) if step == 2 else None
        query, key, value = random_rows(ATTENTION, len(TREE) if step == 2 else count, length)
        found = []
        for own in both:
            own.append(key, value, length)
            found.append(attended(own, ATTENTION, query, KvRows(length, parents, wide=step == 0)))
            if step == 2:
                own.commit(length, [0, 2, 5])
        assert np.array_equal(*found)
        length += 3 if step == 2 else len(query)
        if step == 3:
            length = max(length - int(random.integers(1, 60)), 0)


@pytest.mark.parametrize("keep", [1 / 3, 1 / 16])
@pytest.mark.parametrize("block", [1, 4, 8])
def test_a_row_attends_to_the_heaviest_blocks(keep, block):
    choice, length = choice_of(ATTENTION, keep, block), 700
    own = store(choice)
    filled(own, length)
    query, key, value = random_rows(ATTENTION, 1, 2)
    own.append(key, value, length)
    found = attended(own, ATTENTION, query, KvRows(length))
    assert np.allclose(found, expected(own, choice, query[0], length), atol=1e-5)
    assert not np.allclose(found, attended(own, ATTENTION, query, KvRows(length, wide=True)), atol=1e-3)


def expected(own: ContiguousStore, choice: Choice, query: np.ndarray, position: int) -> np.ndarray:
    """What the row at `position` should give, from its definition."""
    labels, group, parts = choice.labels, ATTENTION.heads // ATTENTION.kv_heads, []
    for head in range(ATTENTION.kv_heads):
        keys, values = own.memory[head, : position + 1].astype(np.float64).swapaxes(0, 1)
        codes = np.clip(np.rint((keys @ labels.keys[head].T - labels.low[head]) / labels.step[head]), 0, 15)
        block, end = choice.block, recent(position)
        weight = np.zeros(end - block)
        for q in query[head * group : (head + 1) * group]:
            w = (q @ labels.queries[head].T) * labels.step[head]
            scale = np.abs(w).max() / 127
            scores = ATTENTION.scale * scale * (codes[block:end] @ np.rint(w / scale))
            weight += np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        weights = weight.reshape(-1, block).sum(1)
        count = min(math.ceil(choice.shares[head] * (position + 1) / block), len(weights))
        chosen = np.sort(np.argsort(-weights, kind="stable")[:count]) + 1
        seen = np.concatenate(
            (np.arange(block), (chosen[:, None] * block + np.arange(block)).ravel(), np.arange(end, position + 1))
        )
        for q in query[head * group : (head + 1) * group]:
            scores = ATTENTION.scale * (keys[seen] @ q)
            share = np.exp(scores - scores.max())
            parts.append(share / share.sum() @ values[seen])
    return np.concatenate(parts)


@pytest.mark.parametrize("length", [47, 200, 700])
def test_a_tree_has_the_bits_of_its_paths(length):
    choice = choice_of(ATTENTION, 1 / 16, 4)
    query, key, value = random_rows(ATTENTION, len(TREE), 3)
    tree = store(choice)
    filled(tree, length)
    tree.append(key, value, length)
    together = attended(tree, ATTENTION, query, KvRows(length, np.asarray(TREE, np.int32)))
    for node in range(len(TREE)):
        path = [node]
        while TREE[path[0]] >= 0:
            path.insert(0, TREE[path[0]])
        own = store(choice)
        filled(own, length)
        for at, row in enumerate(path, length):
            one = slice(row, row + 1)
            own.append(key[one], value[one], at)
            alone = attended(own, ATTENTION, query[one], KvRows(at))
        assert np.array_equal(alone[0], together[node])


def test_a_text_scored_in_long_passes_has_the_bits_of_steps():
    choice, length = choice_of(ATTENTION, 1 / 16, 4), 333
    query, key, value = random_rows(ATTENTION, 60, 4)
    long, short = store(choice), store(choice)
    for own in (long, short):
        filled(own, length)
    long.append(key, value, length)
    found = attended(long, ATTENTION, query, KvRows(length))
    for i in range(60):
        one = slice(i, i + 1)
        short.append(key[one], value[one], length + i)
        assert np.array_equal(attended(short, ATTENTION, query[one], KvRows(length + i))[0], found[i])


def test_labels_follow_a_sequence_that_was_cut_back():
    choice = choice_of(ATTENTION, 1 / 16, 4)
    plain, cut = store(choice), store(choice)
    filled(cut, 700, seed=9)
    for own in (plain, cut):
        _, key, value = random_rows(ATTENTION, 640, 1)
        first = 0 if own is plain else 100
        if own is cut:
            own.memory[:, :100] = plain.memory[:, :100]
        for begin in range(first, 640, 60):
            own.append(key[begin : begin + 60], value[begin : begin + 60], begin)
    query, key, value = random_rows(ATTENTION, 5, 2)
    found = []
    for own in (plain, cut):
        if own is cut:  # the first positions were labelled by other keys, and then again
            own.restart()
            own.memory[:, :640] = plain.memory[:, :640]
        own.append(key, value, 640)
        found.append(attended(own, ATTENTION, query, KvRows(640)))
    assert np.array_equal(*found)


def test_labelling_a_long_session_takes_little_memory_beside_the_plan():
    """All positions but the last are without labels when a session has been resumed."""
    choice = choice_of(ATTENTION, 1 / 16, 4)
    tracemalloc.start()
    try:
        own = store(choice)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        _, key, value = random_rows(ATTENTION, 1, 2)
        own.append(key, value, CONTEXT - 1)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak < 150 * ATTENTION.kv_heads * ATTENTION.head_dim * 4  # float32 keys of all positions take six times that
    fitted, index = choice.labels, own._chooser.index
    assert np.shares_memory(index._keys, fitted.keys)
    assert np.shares_memory(index._queries, fitted.queries)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_drafts_do_not_change_what_sparse_attention_writes(tmp_path, family):
    _, checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", seed=3)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.F32)
    labels = spec_labels(packed.spec)
    prompt = np.random.default_rng(7).integers(3, VOCAB, 60).tolist() * 2

    def texts(share: float, draft: int, keep: float) -> list[int]:
        options = {"context": 240, "chunk": 32, "max_draft_tokens": draft, "kv": SparseKv.of(labels, keep)}
        with tiny_engine(packed, share, **options) as engine:
            assert engine.plan.owners["KV"] == planned(engine)
            generation = engine.generate(prompt, 100, Sampling(temperature=2.0, seed=5), ignore_eos=True)
            list(generation)
            return generation.report.token_ids

    kept = texts(1.0, 1, 1 / 32)
    assert kept == texts(1.0, 8, 1 / 32) == texts(0.3, 8, 1 / 32)
    assert family == "gemma3" or kept != texts(1.0, 1, 1.0)  # the tiny gemma3 repeats one token


def test_a_text_is_scored_as_it_would_be_decoded(tmp_path):
    """Wide passes attend to everything: they would say that nothing is lost."""
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.F32)
    ids = np.random.default_rng(7).integers(3, VOCAB, 400).tolist()
    found = []
    for kv in (None, SparseKv.of(spec_labels(packed.spec), 1 / 32)):
        with tiny_engine(packed, 1.0, context=240, chunk=64, scoring=True, kv=kv) as engine:
            found.append([engine.score(ids, 200, as_decoded=as_decoded)[0] for as_decoded in (False, True)])
    exact, sparse = found
    assert sparse[0] == sparse[1]
    assert abs(sparse[0] - exact[1]) > 1e-3


def test_to_keep_all_is_to_keep_all_whatever_the_heads_shares(tmp_path):
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.F32)
    labels = spec_labels(packed.spec)
    labels = replace(labels, shares=tuple((0.25,) * len(own) for own in labels.shares))
    for keep, all_kept in ((1.0, True), (0.99, False)):
        own = SparseKv.of(labels, keep)
        assert [layer.kept(500, 0) == layer.end(500) - 1 for layer in own.layers] == [all_kept] * len(own.layers)
        assert own.loss == (0.0 if all_kept else None)


def planned(engine: Engine) -> int:
    """Bytes that a cache takes which is opened as the engine's was."""
    limits, taken = engine.plan.kv_limits, 0

    def allocate(shape: tuple[int, ...], dtype: type) -> np.ndarray:
        nonlocal taken
        array = np.zeros(shape, dtype)
        taken += array.nbytes
        return array

    kernels = Kernels(ops.load("cpu"), np.zeros(0, np.uint8))
    open_cache(engine.spec, limits, kernels, allocate, choices=engine.plan.choices)
    assert taken == kv_bytes(engine.spec, limits, choices=engine.plan.choices)
    return taken


@pytest.mark.parametrize("keep", ["1/16", "1/1000000", "3/4", "3/10"])
def test_however_small_a_share_is_it_is_named(keep):
    above, below = map(int, keep.split("/"))
    assert SparseKv(above / below, None, ()).describe().startswith(f"{keep} of the tokens")
