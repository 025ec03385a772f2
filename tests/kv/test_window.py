"""The window's store against the one that holds everything: the same bits, whatever a sequence goes through."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.engine.engine import Engine
from flashrt.engine.runtime import CpuRuntime
from flashrt.kv.base import Kernels, KvLimits, KvRows
from flashrt.kv.cache import KINDS, kv_bytes
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.reach import KEPT
from flashrt.kv.window import WindowStore
from flashrt.spec import Attention
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

CONTEXT = 1400
TREE = [-1, -1, 0, 0, 1, 2, 2, 5, 7, 8, 9, 3, 10, 12, 4, 13]


def stores(window: int, rows: int, codec: KvCodec = KvCodec.BF16) -> tuple[Attention, list[ContiguousStore]]:
    attention = Attention(heads=6, kv_heads=3, head_dim=20, scale=0.3, window=window)
    kernels = Kernels(ops.load("cpu"), None)
    kinds = (ContiguousStore, WindowStore)
    limits = KvLimits(CONTEXT, rows, codec=codec)
    return attention, [kind(attention, limits, kernels, np.zeros) for kind in kinds]


def run(attention: Attention, both: list[ContiguousStore], start: int, rows: int, seed: int, parents=None) -> None:
    """Append rows and attend; both stores must give the same bits."""
    random = np.random.default_rng(seed)
    qkv = random.normal(size=(rows, attention.heads + 2 * attention.kv_heads, attention.head_dim)).astype(np.float32)
    query, key, value = np.split(qkv, [attention.heads, attention.heads + attention.kv_heads], 1)
    found = []
    for store in both:
        store.append(key, value, start)
        out = np.full((rows, attention.heads * attention.head_dim), np.nan, np.float32)
        tree = None if parents is None else np.asarray(parents, np.int32)
        store.attend(query, KvRows(start, tree), slice(0, attention.kv_heads), out)
        found.append(out)
    assert np.array_equal(*found)
    assert np.isfinite(found[0]).all()


@pytest.mark.parametrize("window", [1, 8, 13, 40, 300])
@pytest.mark.parametrize("rows", [16, 50])
@pytest.mark.parametrize("codec", KvCodec)
def test_the_bits_of_all_positions(window, rows, codec):
    attention, both = stores(window, rows, codec)
    random, length, slid, furthest = np.random.default_rng(window), 0, 0, 0
    while length < CONTEXT - rows - 16:
        step = int(random.integers(4))
        if step == 0:  # prefill
            run(attention, both, length, rows, length)
            length += rows
        elif step == 1:
            count = int(random.integers(1, 17))
            run(attention, both, length, count, length)
            length += count
        elif step == 2:  # drafts behind the sequence, which the tree overwrites
            for ahead in range(int(random.integers(1, 16))):
                run(attention, both, length + ahead, 1, length + ahead)
            run(attention, both, length, len(TREE), length, TREE)
            path = [[], [0, 2, 5], [1, 4, 14], [0]][int(random.integers(4))]
            for store in both:
                store.commit(length, path)
            length += len(path)
        else:  # some tokens taken back
            length = max(length - int(random.integers(1, 60)), furthest - KEPT + 16, 0)
            assert [store.truncate(length, furthest) for store in both] == [length, length]
        slid, furthest = max(slid, both[1].first), max(furthest, length)
    assert slid >= 2 * ATTENTION_SEGMENT


def test_what_is_gone_is_not_gone_on_from():
    attention, both = stores(20, 16)
    for start in range(0, 1200, 16):
        run(attention, both, start, 16, start)
    assert both[1].first % ATTENTION_SEGMENT == 0
    for store in both:
        assert store.truncate(1200 - KEPT + 16, 1200) == 1200 - KEPT + 16
        assert store.truncate(1200 - KEPT + 15, 1200) == 0
        store.restart()
    for start in range(0, 600, 16):
        run(attention, both, start, 16, start)


@pytest.mark.parametrize("window", [1, 20, 300])
@pytest.mark.parametrize("rows", [16, 64, 512])
def test_what_is_gone_on_from_is_held_whatever_the_memory(window, rows):
    attention, both = stores(window, rows)
    top = 0
    while top < CONTEXT - rows:
        run(attention, both, top, rows, top)
        for ahead in range(min(16, CONTEXT - top - rows)):  # drafts
            run(attention, both, top + rows + ahead, 1, top + ahead)
        top += rows
        for length in (top - KEPT, top - KEPT + 16, top - 1, top // 2):
            kept = {store.truncate(max(length, 0), top) for store in both}
            assert len(kept) == 1
            if (held := kept.pop()) > 0:
                run(attention, both, held, 1, held)


def test_an_interrupted_slide_is_never_gone_on_from():
    """Whatever comes next: the store has forgotten everything, or says so."""
    attention, (_, window) = stores(20, 16)

    key = np.zeros((16, attention.kv_heads, attention.head_dim), np.float32)
    memory, start = window.memory, 0
    while start + 16 <= memory.shape[1]:
        window.append(key, key, start)
        start += 16

    class Memory:
        shape = memory.shape

        def __iter__(self):
            yield memory[0]
            raise KeyboardInterrupt

    window.memory = Memory()
    with pytest.raises(KeyboardInterrupt):
        window.append(key, key, start)
    window.memory = memory
    with pytest.raises(Exception, match="start|position|context|rows"):
        window.append(key, key, start)
    assert window.truncate(start, start) == 0
    window.restart()
    window.append(key, key, 0)


def test_a_store_is_chosen_by_what_it_takes():
    local, whole = Attention(4, 2, 16, 1.0, window=100), Attention(4, 2, 16, 1.0)
    limits = KvLimits(5000, 64)
    assert WindowStore.claim(whole, limits) is None
    assert WindowStore.claim(local, limits) == 128 * (99 + KEPT + ATTENTION_SEGMENT - 1 + 64)
    assert ContiguousStore.claim(local, limits) == 128 * 5000
    assert WindowStore.claim(local, KvLimits(300, 64)) == ContiguousStore.claim(local, KvLimits(300, 64))


@pytest.fixture(scope="module", params=[8, 13, 40])
def packed(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"window{request.param}")
    options = {"sliding_window": request.param, "max_position_embeddings": 4096}
    _, checkpoint = tiny_checkpoint("gemma3", root / "checkpoint", seed=3, **options)
    return make_pack(checkpoint, root / "pack", Codec.INT8)


def engines(packed, share: float = 1.0, **options):
    """One that holds everything, and one that holds windows."""
    runtimes = [CpuRuntime(2, kinds) for kinds in ((ContiguousStore,), KINDS)]
    return [tiny_engine(packed, share, runtime, context=CONTEXT, **options) for runtime in runtimes]


def text_of(engine: Engine, prompt: list[int], new: int, **options) -> list[int]:
    generation = engine.generate(prompt, new, ignore_eos=True, **options)
    list(generation)
    return generation.report.token_ids


@pytest.mark.parametrize(("share", "chunk", "draft"), [(1.0, 16, 1), (0.3, 64, 12), (1.0, 512, 16)])
def test_texts_are_the_same(packed, share, chunk, draft):
    prompt = np.random.default_rng(5).integers(3, VOCAB, 731).tolist()
    whole, windows = engines(packed, share, chunk=chunk, max_draft_tokens=draft)
    with whole, windows:
        assert windows.plan.owners["KV"] < whole.plan.owners["KV"]
        limits = KvLimits(CONTEXT, windows.plan.prefill_chunk)
        assert windows.plan.owners["KV"] == kv_bytes(windows.spec, limits)
        for given, new in ((prompt, 80), (prompt[:5], 600)):
            assert text_of(windows, given, new) == text_of(whole, given, new)


def test_a_conversation_goes_on_as_with_everything(packed):
    """Cut back a little, and further than the window's store remembers: then from the beginning, silently."""
    prompt = np.random.default_rng(5).integers(3, VOCAB, 731).tolist()
    whole, windows = engines(packed, chunk=64)
    with whole, windows:
        answer = text_of(windows, prompt, 20)
        assert answer == text_of(whole, prompt, 20)
        longer = [*prompt, *answer[:-3], 7, 8, 9]
        before = windows.sequence.length
        assert text_of(windows, longer, 20, reuse=True) == text_of(whole, longer, 20, reuse=True)
        assert windows.sequence.length > before
        other = [*prompt[:50], *prompt[100:700]]
        assert text_of(windows, other, 20, reuse=True) == text_of(windows, other, 20)
