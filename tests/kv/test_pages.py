"""Pages: a store that takes them back attends as the one that gave them, and holds all that going on needs."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.kv.base import Kernels, KvLimits
from flashrt.kv.cache import KvCache
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.pages import PAGE_BYTES, Extent, pages
from flashrt.kv.reach import needed, reach
from flashrt.kv.window import WindowStore
from flashrt.spec import Attention
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT
from tests.kv.test_window import CONTEXT, run, stores


@pytest.mark.parametrize("window", [1, 13, 40, 300, 600])
@pytest.mark.parametrize("length", [1, 255, 256, 300, 700, 1111])
@pytest.mark.parametrize("ahead", [0, 100])
def test_both_stores_go_on_from_the_pages_of_either(window, length, ahead):
    """Also from a sequence that was cut back, and between stores of other limits."""
    top = length + ahead
    attention, both = stores(window, 16)
    for start in range(0, top, 16):
        run(attention, both, start, min(16, top - start), start)
    for draft in range(15):  # which may have made a window slide
        run(attention, both, top + draft, 1, top + draft)
    found = list(pages([attention], Extent(0, length, top), KvCodec.BF16))
    _, others = stores(window, 48)
    for store in others:
        store.memory[:] = 0x7FC0  # NaN
        store.restart(needed(window, top))
    given = []
    for page in found:
        for store in both:
            given.append(np.empty(page.shape, np.uint16))
            store.read_page(page.begin, page.heads, given[-1])
        assert np.array_equal(*given[-2:])
        for store in others:
            store.write_page(page.begin, page.heads, given[-1])
    for kept in {length, max(length - 12, 1), max(top - 112, 1)}:
        if kept <= length and reach(window, kept, top) == kept:
            run(attention, [*both, *others][::2], kept, 1, 5)
            run(attention, [*both, *others][1::2], kept, 1, 5)
            run(attention, others, kept, 1, 5)


@pytest.mark.parametrize("window", [1, 20, 255, 256, 257, 700])
@pytest.mark.parametrize("rows", [16, 17, 512])
def test_what_is_needed_is_held_by_the_smallest_memory(window, rows):
    attention, (_, store) = stores(window, rows)
    key = np.ones((rows, attention.kv_heads, attention.head_dim), np.float32)
    random, length, top = np.random.default_rng(window), 0, 0
    while length + rows + 16 <= CONTEXT:
        count = int(random.integers(1, rows + 1))
        store.append(key[:count], key[:count], length)
        length += count
        top = max(top, length)
        store.append(key[:1], key[:1], length + 15)  # a draft
        assert store.first <= needed(window, top)
        assert needed(window, top) % ATTENTION_SEGMENT == 0
        if random.integers(12) == 0:
            back = max(length - int(random.integers(113)), 1)
            length = reach(window, back, top) or length


def test_pages_cover_all_heads_of_all_segments_once():
    layers = [Attention(8, 8, 256, 1.0), Attention(8, 5, 20, 1.0, window=300), Attention(4, 1, 64, 1.0)]
    found = list(pages(layers, Extent(256, 1000, 1100), KvCodec.F32))
    assert [page.begin for page in found] == sorted(page.begin for page in found)
    for layer, attention in enumerate(layers):
        first = max(needed(attention.window, 1100), 256)
        expected = {(begin, head) for begin in range(first, 1000, 256) for head in range(attention.kv_heads)}
        mine = [page for page in found if page.layer == layer]
        heads = [(page.begin, head) for page in mine for head in range(page.heads.start, page.heads.stop)]
        assert len(heads) == len(expected)
        assert set(heads) == expected
        assert all(page.shape[1] == min(256, 1000 - page.begin) for page in mine)
        assert all(4 * page.items <= PAGE_BYTES or page.shape[0] == 1 for page in mine)


def test_a_cache_that_begins_again_tells_its_stores_where():
    attention = Attention(2, 1, 8, 1.0, window=20)
    limits, kernels = KvLimits(2000, 16), Kernels(ops.load("cpu"), None)
    made = [kind(attention, limits, kernels, np.zeros) for kind in (ContiguousStore, WindowStore)]
    cache = KvCache(made, 2000)
    cache.restart([512, 512])
    assert [store.first for store in made] == [0, 512]
    cache.restored(900, 950)
    assert cache.truncate(838) == 838
    assert cache.truncate(837) == 0
    assert [store.first for store in made] == [0, 0]
    assert cache.top == 0
