"""The store whose older positions lie on disk against the one that holds everything: the same bits throughout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from flashrt.errors import DiskError
from flashrt.kv.base import Kernels, KvLimits, KvRows
from flashrt.kv.cache import KINDS, choose, far_layout, kv_bytes
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.far import LayerPages
from flashrt.kv.far_layout import FarLayout, PageId, page_bytes
from flashrt.kv.pages import Extent, pages
from flashrt.kv.spill import SPILL_BUFFERS, Spill
from flashrt.kv.streamed import NEAR, StreamedStore
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from tests.kv.support import attended, random_rows
from tests.kv.test_window import TREE

CONTEXT, ROWS = 2100, 64
ATTENTION = Attention(heads=6, kv_heads=3, head_dim=20, scale=0.3)
LIMITS = KvLimits(CONTEXT, ROWS, held=0)


class Reading:
    """What was asked for, there only when it is waited for."""

    ready = False

    def __init__(self, bring: Callable[[], None]) -> None:
        self.wait = bring

    def cancel(self) -> None: ...


class MemoryFile:
    """A file in memory, whose writes can be held up, and fail."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.zeros(nbytes, np.uint8)
        self.open = threading.Event()
        self.open.set()
        self.error: DiskError | None = None
        self.closed = False

    def write(self, offset: int, data: np.ndarray) -> None:
        assert self.open.wait(10)
        if self.error is not None:
            raise self.error
        self.data[offset : offset + len(data)] = data

    def close(self) -> None:
        self.closed = True

    def page(self, offset: int, out: np.ndarray) -> Reading:
        return Reading(partial(np.copyto, out, self.data[offset : offset + len(out)]))

    def cells(self, offsets: np.ndarray, out: np.ndarray, slots: np.ndarray) -> Reading:
        return Reading(partial(self._bring, offsets, out, slots))

    def _bring(self, offsets: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        out[slots] = self.data[offsets[:, None] + np.arange(out.shape[1])]


class PlainStream:
    """Pages as they are asked for, through memory of its own."""

    def __init__(self, spill: Spill) -> None:
        self.spill, self.memory = spill, np.zeros(spill.layout.largest, np.uint8)

    def take(self, page: PageId) -> np.ndarray:
        self.memory[:] = 0xFF
        self.spill.submit(page, self.memory).wait()
        return self.memory

    def release(self) -> None: ...


class Far:
    """A streamed store over a file in memory."""

    def __init__(self, limits: KvLimits = LIMITS) -> None:
        nbytes = page_bytes(ATTENTION, limits.codec)
        assert limits.held is not None
        layout = FarLayout({4: nbytes}, limits.held, StreamedStore.far_pages(ATTENTION, limits))
        self.file = MemoryFile(layout.nbytes)
        self.spill = Spill(self.file, layout, np.zeros((SPILL_BUFFERS, nbytes), np.uint8), self.file)
        kernels = ops.load("cpu")
        scratch = np.zeros(StreamedStore.scratch_bytes(ATTENTION, limits, kernels), np.uint8)
        open_pages = partial(self._open, 4)
        self.store = StreamedStore(ATTENTION, limits, Kernels(kernels, scratch, open_pages), np.zeros)
        whole = KvLimits(CONTEXT, ROWS, codec=limits.codec)
        self.whole = ContiguousStore(ATTENTION, whole, Kernels(kernels, None), np.zeros)

    def _open(self, layer: int, held: np.ndarray) -> LayerPages:
        return LayerPages(layer, held, self.spill, PlainStream(self.spill))

    def run(self, start: int, rows: int, seed: int, **options: object) -> None:
        """Append rows and attend: both stores must give the same bits."""
        query, key, value = random_rows(ATTENTION, rows, seed)
        far, found = self.store.far(start, rows), []
        for store in (self.whole, self.store):
            store.append(key, value, start)
            found.append(attended(store, ATTENTION, query, KvRows(start, **options)))  # type: ignore[arg-type]
        assert np.array_equal(*found)
        assert self.store.first == 256 * far

    def fill(self, length: int) -> None:
        for start in range(0, length, ROWS):
            self.run(start, min(ROWS, length - start), start)

    def cut(self, length: int, top: int) -> None:
        assert self.store.truncate(length, top) == length
        self.store.cut(length)


@pytest.fixture
def far() -> Iterator[Far]:
    made = Far()
    yield made
    made.store.close()
    assert made.file.closed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("held", [0, 2])
@pytest.mark.parametrize("codec", KvCodec)
def test_the_bits_of_all_positions(seed, held, codec):
    """Prefill, decoding, trees and cuts, in any order, the writes early or late."""
    made = Far(KvLimits(CONTEXT, ROWS, held=held, codec=codec))
    random, length, top, most = np.random.default_rng(seed), 0, 0, 0
    for step in range(220):
        kind = int(random.integers(8))
        if random.integers(4) == 0:
            made.file.open.clear()
            threading.Timer(0.002, made.file.open.set).start()
        if kind <= 3 and length + ROWS + 16 <= CONTEXT:
            rows = int(random.integers(1, ROWS + 1))
            made.run(length, rows, step, wide=True)
            length += rows
        elif kind == 4 and length + 32 <= CONTEXT:
            for ahead in range(int(random.integers(1, 16))):  # drafts behind the sequence, which the tree overwrites
                query, key, value = random_rows(ATTENTION, 1, step)
                made.whole.append(key, value, length + ahead)
                made.store.append(key, value, length + ahead)
                attended(made.store, ATTENTION, query, KvRows(length + ahead, draft=True))
            made.run(length, len(TREE), step, parents=np.asarray(TREE, np.int32))
            path = [[], [0, 2, 5], [1, 4, 14], [0]][int(random.integers(4))]
            for store in (made.whole, made.store):
                store.commit(length, path)
            length += len(path)
        elif kind == 5 and length > 0:
            length = int(random.integers(1, length + 1)) if random.integers(9) == 0 else max(length - 5, 1)
            made.cut(length, top)
        elif length + 16 <= CONTEXT:
            made.run(length, int(random.integers(1, 17)), step)
        top, most = max(top, length), max(most, made.store.first)
    assert most >= 4 * 256
    assert (made.spill.bytes_read > 0) == (held < made.spill.layout.count)
    made.store.close()


def test_the_whole_context_is_held(far):
    far.fill(CONTEXT - 1)
    far.run(CONTEXT - 1, 1, 7)
    assert far.store.first // 256 in (far.spill.layout.count, far.spill.layout.count - 1)


def test_drafts_read_nothing(far):
    far.fill(1500)
    before = far.spill.bytes_read
    query, key, value = random_rows(ATTENTION, 1, 3)
    far.store.append(key, value, 1500)
    guess = attended(far.store, ATTENTION, query, KvRows(1500, draft=True))
    assert far.spill.bytes_read == before
    assert not np.allclose(guess, attended(far.store, ATTENTION, query, KvRows(1500)), atol=1e-3)
    far.run(1500, 1, 3)


@pytest.mark.parametrize("length", [255, 300, 1024, 1999])
def test_sessions_take_pages_and_give_them_back(length):
    """From either kind of store to either: what is on disk, what is held, and what is near."""
    made, other = Far(limits=KvLimits(CONTEXT, ROWS, held=1)), Far(limits=KvLimits(CONTEXT, 16, held=0))
    made.fill(length)
    found = list(pages([ATTENTION], Extent(0, length, length), KvCodec.BF16))
    for store in (other.store, other.whole):
        store.memory[:] = 0x7FC0  # NaN
        store.restart(0)
    for page in found:
        halves = (slice(0, 1), slice(1, ATTENTION.kv_heads))
        for heads in halves:
            given = []
            for store in (made.store, made.whole):
                given.append(np.empty((heads.stop - heads.start, *page.shape[1:]), np.uint16))
                store.read_page(page.begin, heads, given[-1])
            assert np.array_equal(*given)
            for store in (other.store, other.whole):
                store.write_page(page.begin, heads, given[0])
    for own in (made, other):
        own.run(length, 16, 1)
        own.store.close()


def test_a_write_that_failed_is_raised_and_never_attended_to(far):
    far.fill(400)
    far.file.error = DiskError("the disk is broken")

    def go_on() -> None:
        for start in range(400, CONTEXT - ROWS, ROWS):
            far.run(start, ROWS, start, wide=True)
            time.sleep(0.01)

    with pytest.raises(DiskError, match="broken"):
        go_on()
    assert far.store.truncate(400, 1000) == 0
    far.file.error = None
    far.store.restart()
    far.fill(1500)


def test_a_failed_read_loses_the_sequence_where_it_is_cut(far, monkeypatch):
    far.fill(CONTEXT - ROWS)
    far.file.open.wait()

    def broken() -> None:
        raise DiskError("unreadable")

    deadline = time.monotonic() + 10
    while far.spill._queue or far.spill._writing:
        assert time.monotonic() < deadline
    for _ in range(SPILL_BUFFERS):  # so that no buffer serves the page
        far.spill.put(PageId(4, 5), np.zeros((3, 256, 2, 20), np.uint16))
    monkeypatch.setattr(far.file, "page", lambda offset, out: Reading(broken))
    with pytest.raises(DiskError, match="unreadable"):
        far.store.cut(100)
    assert far.store.truncate(100, 2000) == 0
    monkeypatch.undo()
    far.store.restart()
    far.fill(700)


def test_what_is_cut_off_is_not_read(far):
    """A page that is written again replaces the one before, also while that is still on its way."""
    far.fill(1500)
    far.file.open.clear()
    far.cut(100, 1500)
    with pytest.raises((RuntimeError, IndexError)):
        far.spill.fetch(PageId(4, 1))
    threading.Timer(0.05, far.file.open.set).start()
    for start in range(100, 1500, 50):
        far.run(start, 50, 10_000 + start)


def test_closing_while_a_write_is_under_way():
    made = Far()
    made.fill(600)
    made.file.open.clear()
    for segment in range(3):
        made.spill.put(PageId(4, segment), np.ones((3, 256, 2, 20), np.uint16))
    threading.Timer(0.05, made.file.open.set).start()
    made.store.close()
    made.store.close()
    assert made.file.closed
    assert not made.spill._writer.is_alive()


def test_an_interrupted_slide_is_never_gone_on_from(far, monkeypatch):
    far.fill(NEAR + ROWS)
    monkeypatch.setattr("flashrt.kv.streamed.slide_down", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    _, key, value = random_rows(ATTENTION, ROWS, 0)
    with pytest.raises(KeyboardInterrupt):
        far.store.append(key, value, NEAR + ROWS)
    monkeypatch.undo()
    assert far.store.truncate(10, 10) == 0
    far.store.restart()
    far.fill(900)


def test_layers_that_stream_are_those_for_which_it_pays():
    local = Attention(6, 3, 20, 0.3, window=100)
    spec = ModelSpec("any", 10, 64, tuple(Layer(a, Ffn(8, "silu")) for a in (ATTENTION, local, ATTENTION)), 5000)
    limits = KvLimits(5000, 64, held=3)
    layout = far_layout(spec, limits)
    assert layout is not None
    assert list(layout.page_bytes) == [0, 2]
    assert choose(local, limits, KINDS)[0] is not StreamedStore
    assert far_layout(spec, KvLimits(5000, 64)) is None
    assert far_layout(spec, KvLimits(500, 64, held=0)) is None
    one = kv_bytes(spec, KvLimits(5000, 64, held=4)) - kv_bytes(spec, limits)
    assert one == sum(layout.page_bytes.values())


def test_places_do_not_overlap():
    layout = FarLayout({0: 8192, 3: 4096, 7: 12288}, 2, 9)
    places = sorted(layout.place(PageId(layer, segment)) for layer in layout.page_bytes for segment in range(2, 9))
    end = 0
    for offset, nbytes in places:
        assert offset == end
        end += nbytes
    assert end == layout.nbytes
    for segment in (1, 9):
        with pytest.raises(IndexError):
            layout.place(PageId(0, segment))
