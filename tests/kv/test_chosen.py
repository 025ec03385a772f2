"""The store that chooses of what lies on disk against the one that holds everything: the same bits throughout."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from flashrt.errors import DiskError
from flashrt.kv.base import Kernels, KvLimits, KvRows
from flashrt.kv.cells import KvCells
from flashrt.kv.choice import Choice
from flashrt.kv.chosen import ChosenStore
from flashrt.kv.far import LayerPages
from flashrt.kv.far_layout import FarLayout, cell_bytes, page_bytes
from flashrt.kv.sparse import SparseStore
from flashrt.kv.spill import SPILL_BUFFERS, Spill
from flashrt.spec import Attention
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from tests.kv.support import attended, choice_of, random_rows
from tests.kv.test_streamed import MemoryFile, PlainStream
from tests.kv.test_window import TREE

CONTEXT, ROWS, LAYER = 2100, 64, 4
ATTENTION = Attention(heads=6, kv_heads=3, head_dim=20, scale=0.3)


class Pair:
    """A store over a file in memory, and one that holds everything. `spare`: cells held beside those of one row."""

    def __init__(
        self, choice: Choice, codec: KvCodec = KvCodec.BF16, attention: Attention = ATTENTION, spare: int = 0
    ) -> None:
        self.attention = attention
        nbytes = cell_bytes([attention], choice.block, codec)
        limits = KvLimits(CONTEXT, ROWS, choice, held=0, cell_bytes=nbytes, codec=codec)
        pages = ChosenStore.far_pages(attention, limits)
        layout = FarLayout({LAYER: page_bytes(attention, codec)}, 0, pages, {LAYER: attention.kv_heads}, nbytes)
        self.file = MemoryFile(layout.nbytes)
        self.spill = Spill(self.file, layout, np.zeros((SPILL_BUFFERS, layout.largest), np.uint8), self.file)
        self.cells = KvCells(self.spill, ChosenStore.cells(attention, limits) + spare, np.zeros)
        kernels = ops.load("cpu")
        scratch = np.zeros(ChosenStore.scratch_bytes(attention, limits, kernels), np.uint8)
        self.far = ChosenStore(attention, limits, Kernels(kernels, scratch, self._open), np.zeros)
        whole = KvLimits(CONTEXT, ROWS, choice, codec=codec)
        scratch = np.zeros(SparseStore.scratch_bytes(attention, whole, kernels) + (1 << 20), np.uint8)
        self.whole = SparseStore(attention, whole, Kernels(kernels, scratch), np.zeros)

    def _open(self, held: np.ndarray) -> LayerPages:
        return LayerPages(LAYER, held, self.spill, PlainStream(self.spill), self.cells.open(LAYER))

    def run(self, start: int, rows: int, seed: int, ahead: bool = False, **options: object) -> None:
        """Append rows and attend: both stores must give the same bits."""
        query, key, value = random_rows(self.attention, rows, seed)
        where = KvRows(start, **options)  # type: ignore[arg-type]
        if ahead and self.far.looks_ahead:
            self.far.look_ahead(query + np.float32(0.3), where, 0.0)
        found = []
        for store in (self.whole, self.far):
            store.append(key, value, start)
            found.append(attended(store, self.attention, query, where))
        assert np.array_equal(*found)

    def fill(self, length: int) -> None:
        for start in range(0, length, ROWS):
            self.run(start, min(ROWS, length - start), start, wide=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("codec", [KvCodec.BF16, KvCodec.F32])
@pytest.mark.parametrize(("keep", "block", "spare"), [(1 / 16, 4, 0), (1 / 4, 4, 30), (1.0, 2, 0), (1 / 8, 8, 10)])
def test_the_bits_of_all_positions(seed, codec, keep, block, spare):
    """Prefill, decoding with and without looking ahead, trees and cuts, in any order, the writes early or late."""
    pair = Pair(choice_of(ATTENTION, keep, block), codec, spare=spare)
    random, length, top, far_passes = np.random.default_rng(seed), 1000, 1000, 0
    pair.fill(length)
    for step in range(150):
        far_passes += pair.far.first > 0
        kind = int(random.integers(8))
        if random.integers(4) == 0:
            pair.file.open.clear()
            threading.Timer(0.002, pair.file.open.set).start()
        if kind <= 2 and length + ROWS + 16 <= CONTEXT:
            rows = int(random.integers(17, ROWS + 1))
            pair.run(length, rows, step, wide=kind > 0)
            length += rows
        elif kind <= 4 and length + 16 <= CONTEXT:
            rows = int(random.integers(1, 17))
            pair.run(length, rows, step, ahead=bool(random.integers(2)))
            length += rows
        elif kind == 5 and length + 16 <= CONTEXT:
            pair.run(length, len(TREE), step, ahead=True, parents=np.asarray(TREE, np.int32))
            for store in (pair.whole, pair.far):
                store.commit(length, [0, 2, 5])
            length += 3
        elif kind == 6 and length:
            length = int(random.integers(max(length - (700 if random.integers(4) == 0 else 60), 0), length + 1))
            assert pair.far.truncate(length, top) == length
            for store in (pair.whole, pair.far):
                store.cut(length)
        elif kind == 7 and random.integers(20) == 0:
            for store in (pair.whole, pair.far):
                store.restart()
            length = top = 0
        top = max(top, length)
    assert far_passes > 75
    assert pair.cells.cache.counts["misses"] > 0
    pair.far.close()


@pytest.mark.parametrize("length", [*range(500, 570, 5), 256, 257, 300, 303, 304, 1023, 1024, 1025, 1400])
def test_a_row_after_a_cut_finds_what_is_always_attended_to(length):
    pair = Pair(choice_of(ATTENTION, 1 / 16, 4))
    pair.fill(1408)
    for store in (pair.whole, pair.far):
        store.cut(length)
    for step in range(3):
        pair.run(length + step, 1, step)
    pair.run(length + 3, len(TREE), 9, parents=np.asarray(TREE, np.int32))
    pair.far.close()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (12, 2, 96), (8, 1, 128), (3, 3, 36)])
def test_heads_of_any_size(heads, kv_heads, dim):
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=dim, scale=0.2)
    pair = Pair(choice_of(attention, 1 / 16, 8), attention=attention)
    pair.fill(1500)
    for step in range(40):
        pair.run(1500 + step, 1, step, ahead=step % 2 == 0)
    assert pair.cells.cache.counts["hits"] > 0
    assert pair.spill.bytes_read > 0
    pair.far.close()


def test_pages_taken_back_from_a_session_are_labelled():
    pair = Pair(choice_of(ATTENTION, 1 / 8, 4))
    pair.fill(1400)
    saved = [np.zeros((3, min(256, 1400 - begin), 2, 20), np.uint16) for begin in range(0, 1400, 256)]
    for segment, page in enumerate(saved):
        pair.far.read_page(256 * segment, slice(0, 3), page)
    pair.far.restart()
    for segment, page in enumerate(saved):
        for heads in (slice(0, 2), slice(2, 3)):
            pair.far.write_page(256 * segment, heads, page[heads])
    for step in range(20):
        pair.run(1400 + step, 1, step)
    pair.far.close()


def test_a_failed_read_leaves_nothing_wrong_behind():
    pair = Pair(choice_of(ATTENTION, 1 / 16, 4))
    pair.fill(1500)
    bring, fails = pair.file._bring, [True]

    def failing(*arguments: np.ndarray) -> None:
        if fails[0]:
            raise DiskError("a read failed")
        bring(*arguments)

    pair.file._bring = failing  # type: ignore[method-assign]
    query, key, value = random_rows(ATTENTION, 1, 1)
    pair.far.append(key, value, 1500)
    with pytest.raises(DiskError, match="a read failed"):
        attended(pair.far, ATTENTION, query, KvRows(1500))
    fails[0] = False
    for step in range(5):
        pair.run(1500 + step, 1, step)
    pair.far.close()


@pytest.mark.parametrize(
    ("dims", "block", "codec", "expected"),
    [
        ([128], 8, "bf16", 4096),
        ([64], 8, "bf16", 4096),
        ([96], 8, "bf16", 12288),
        ([128, 256], 8, "bf16", 8192),
        ([20], 8, "bf16", 20480),
        ([128], 1, "f32", 4096),
        ([80], 8, "bf16", 20480),
        ([7], 8, "bf16", 0),
        ([128], 8, "int8", 0),  # they would be 256 positions
        ([64], 8, "int4", 0),
        ([128], 8, "int4", 0),
        ([80, 112], 8, "int4", 0),
        ([256], 8, "int4", 0),
        ([256], 8, "int8", 0),
        ([72], 8, "bf16", 36864),
    ],
)
def test_cells_are_whole_pages_of_a_disk_and_whole_blocks(dims, block, codec, expected):
    attentions = [Attention(heads=2, kv_heads=2, head_dim=dim, scale=1.0) for dim in dims]
    nbytes = cell_bytes(attentions, block, KvCodec(codec))
    assert nbytes == expected
    for dim in dims if nbytes else ():
        tokens = nbytes / KvCodec(codec).nbytes(dim)
        assert tokens % block == 0
        assert 256 % tokens == 0
