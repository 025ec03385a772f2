"""The row cache against a dict, under random traces, with reads that come late, out of order, or never."""

from __future__ import annotations

import mmap
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.budget.claims.rows import index_bytes, least_slots
from flashrt.cache import rows as rows_module
from flashrt.cache.rows import RowCache
from flashrt.cache.verification import Verifier
from flashrt.errors import BudgetError, DiskError, PackError
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.layout import TensorLayout, pack_layout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels import cpu
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import Codec
from tests.conftest import MakePack

UNIT = 128


def spec(neurons: int) -> ModelSpec:
    layer = Layer(Attention(1, 1, 8, 0.4), Ffn(neurons, "relu", gated=False, bias=True))
    return ModelSpec("relu", 16, 20, (layer,), 32, norm="layer", positions=34, position_offset=2)


def layout(neurons: int) -> TensorLayout:
    return pack_layout(spec(neurons), Codec.INT8, 1 << 13).tensors["0.ffn"]


class FakeReader:
    """Row r is filled with bytes of r, when told to or when somebody waits."""

    def __init__(self, tensor: TensorLayout) -> None:
        self.tensor = tensor
        self.flying: list[LateTicket] = []
        self.requests: list[list[int]] = []
        self.fails = False

    def submit_rows(self, file: str, offsets: np.ndarray, out: np.ndarray, slots: np.ndarray) -> LateTicket:
        assert file == self.tensor.file
        assert offsets.dtype == slots.dtype == np.int64
        rows, rest = np.divmod(offsets - self.tensor.offset, self.tensor.stride)
        assert not rest.any()
        self.requests.append(rows.tolist())
        ticket = LateTicket(rows, out, slots, DiskError("broken") if self.fails else None)
        self.flying.append(ticket)
        return ticket

    def settle(self) -> None:
        for ticket in self.flying:
            ticket.arrive()


class LateTicket:
    def __init__(self, rows: np.ndarray, out: np.ndarray, slots: np.ndarray, error: Exception | None) -> None:
        self.rows, self.out, self.slots, self.error = rows, out, slots.copy(), error
        self.ready = False
        self.bytes_read = 4096 * len(rows)

    def arrive(self) -> None:
        if not self.ready and self.error is None:
            self.out[self.slots] = content(self.rows, self.out.shape[1])
        self.ready = True

    def wait(self) -> None:
        self.arrive()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.ready = True


class Trusting:
    """A verifier that has seen everything."""

    def check(self, tensor: TensorLayout, indices: list[int]) -> None: ...


def content(rows: np.ndarray, nbytes: int) -> np.ndarray:
    return (rows[:, None] * 7 + np.arange(nbytes) + 1 + rows[:, None] // 256).astype(np.uint8)


def fake_cache(neurons: int, slots: int, pinned: int) -> tuple[RowCache, FakeReader]:
    tensor = layout(neurons)
    reader = FakeReader(tensor)
    memory = np.full((slots, tensor.stride), 0xEE, np.uint8)
    cache = RowCache(reader, Trusting(), tensor, memory, pinned)  # type: ignore[arg-type]
    memory[:pinned] = content(np.arange(pinned), tensor.stride)
    return cache, reader


def taken(cache: RowCache, rows: np.ndarray) -> list[int]:
    """Go through the passes of `rows`, checking each; the sizes of the passes."""
    found, sizes = [], []
    for part, slots in cache.ensure(rows):
        assert cache.memory[slots].tobytes() == content(part, cache.tensor.stride).tobytes()
        found += part.tolist()
        sizes.append(len(part))
    assert found == rows.tolist()
    assert all(size % UNIT == 0 for size in sizes[:-1])
    return sizes


def some(seed: int, neurons: int, count: int) -> np.ndarray:
    """Ascending rows, low ones far more often, as when neurons are ordered hot first."""
    draws = np.random.default_rng(seed).random(4 * count) ** 3 * neurons
    return np.unique(draws.astype(np.int32))[:count]


class Model:
    """What the cache should hold: a dict in the order of use."""

    def __init__(self, pinned: int, window: int) -> None:
        self.pinned, self.window = pinned, window
        self.held: OrderedDict[int, None] = OrderedDict()

    def use(self, rows: list[int]) -> list[int]:
        """Touch rows that fit; those that had to be read."""
        unpinned = [row for row in rows if row >= self.pinned]
        missing = [row for row in unpinned if row not in self.held]
        for row in unpinned:
            self.held.pop(row, None)
        while len(self.held) + len(unpinned) > self.window:
            self.held.popitem(last=False)
        self.held.update(dict.fromkeys(reversed(unpinned)))  # the coldest is the first to go
        return missing


actions = st.lists(
    st.tuples(st.sampled_from(["ensure", "prefetch", "arrive", "fail", "abandon", "leave"]), st.integers(0, 40)),
    max_size=40,
)


@given(st.integers(0, 150), st.integers(0, 120), actions)
@settings(max_examples=150, deadline=None)
def test_against_a_dict(pinned: int, spare: int, trace: list[tuple[str, int]]) -> None:
    neurons = 500
    cache, reader = fake_cache(neurons, least_slots(neurons, pinned) + spare, pinned)
    model, guessed = Model(pinned, cache.window), 0
    for action, n in trace:
        rows = some(n, neurons, 7 * n)
        fits = np.count_nonzero(rows >= pinned) <= cache.window
        before = len(reader.requests)
        if action == "ensure":
            taken(cache, rows)
        elif action == "prefetch":
            cache.prefetch(rows)
            guessed += sum(map(len, reader.requests[before:]))
        elif action == "leave":
            next(cache.ensure(rows), None)
        elif action == "arrive" and reader.flying:
            reader.flying[n % len(reader.flying)].arrive()
        elif action == "fail":
            reader.fails = True
            read = sum(row >= pinned and row not in model.held for row in rows.tolist())
            if read and fits:
                with pytest.raises(DiskError, match="broken"):
                    taken(cache, rows)
            reader.fails = False
        elif action == "abandon":
            cache.abandon()
        cache.check_integrity()
        if action in ("ensure", "prefetch") and fits:
            assert list(chain(*reader.requests[before:])) == model.use(rows.tolist())
        else:
            model = known(cache)
        assert list(model.held) == list(known(cache).held)
    assert cache.statistics.prefetched == guessed


def known(cache: RowCache) -> Model:
    """A model of what the cache holds now: after what is lost in ways that a dict does not explain."""
    model = Model(cache.pinned, cache.window)
    rows = cache._row_in[cache._live()]
    model.held.update(dict.fromkeys(rows[rows >= 0].tolist()))
    return model


def test_a_layer_that_is_all_pinned_reads_nothing() -> None:
    cache, reader = fake_cache(300, 300, 300)
    assert taken(cache, some(1, 300, 90)) == [len(some(1, 300, 90))]
    assert reader.requests == []
    assert cache.statistics.pinned_hits == cache.statistics.asked > 0


def test_a_window_alone() -> None:
    cache, reader = fake_cache(300, 200, 0)
    rows = np.arange(150, dtype=np.int32)
    taken(cache, rows)
    taken(cache, rows)
    assert reader.requests == [rows.tolist()]
    assert (cache.statistics.misses, cache.statistics.hits) == (150, 150)


def test_more_rows_than_slots_come_in_whole_units() -> None:
    cache, reader = fake_cache(1000, 60 + UNIT + 30, 60)
    rows = np.arange(5, 905, dtype=np.int32)
    sizes = taken(cache, rows)
    assert sum(sizes) == len(rows)
    assert len(sizes) > 4
    assert list(chain(*reader.requests)) == rows[rows >= 60].tolist()
    cache.check_integrity()


def test_leading_rows_are_handed_out_while_others_are_read() -> None:
    cache, reader = fake_cache(1000, 700, 256)
    passes = cache.ensure(np.arange(0, 600, 2, dtype=np.int32))
    assert len(next(passes).rows) == UNIT  # 128 pinned rows, then those of which the first is missing
    assert not reader.flying[0].ready
    assert len(next(passes).rows) == 300 - UNIT


def test_a_guess_is_read_early_and_counted() -> None:
    cache, reader = fake_cache(1000, 400, 100)
    cache.prefetch(np.arange(90, 200, dtype=np.int32))
    assert not reader.flying[0].ready
    taken(cache, np.arange(95, 205, dtype=np.int32))
    assert [len(request) for request in reader.requests] == [100, 5]
    count = cache.statistics
    assert (count.prefetched, count.useful, count.pinned_hits, count.hits, count.misses) == (100, 100, 5, 100, 5)
    assert count.bytes_read == 4096 * 105
    assert count.bytes_wanted == cache.tensor.stride * 105


def test_a_guess_is_useful_once_and_only_while_it_is_there() -> None:
    cache, _ = fake_cache(1000, 2 * UNIT, 0)
    cache.prefetch(np.arange(50, dtype=np.int32))
    taken(cache, np.arange(40, 60, dtype=np.int32))
    taken(cache, np.arange(40, 60, dtype=np.int32))
    assert (cache.statistics.prefetched, cache.statistics.useful) == (50, 10)
    taken(cache, np.arange(500, 500 + 2 * UNIT, dtype=np.int32))  # the other guesses have to go
    taken(cache, np.arange(50, dtype=np.int32))
    assert (cache.statistics.prefetched, cache.statistics.useful) == (50, 10)
    cache.check_integrity()


def test_guesses_lost_on_the_way_are_not_useful() -> None:
    cache, reader = fake_cache(1000, 400, 0)
    cache.prefetch(np.arange(30, dtype=np.int32))
    reader.flying[0].arrive()
    cache.prefetch(np.arange(100, dtype=np.int32))
    cache.abandon()  # the second read is under way, the first is over
    taken(cache, np.arange(100, dtype=np.int32))
    assert (cache.statistics.prefetched, cache.statistics.useful, cache.statistics.misses) == (100, 30, 70)
    cache.check_integrity()


def test_a_guess_still_being_read_is_not_overwritten() -> None:
    """Its slot is wanted for another row: two reads into one slot could end in any order."""
    cache, reader = fake_cache(1000, UNIT, 0)
    cache.prefetch(np.arange(100, dtype=np.int32))
    passes = cache.ensure(np.arange(500, 500 + UNIT, dtype=np.int32))
    next(passes)
    reader.flying[0].arrive()
    taken(cache, np.arange(500, 500 + UNIT, dtype=np.int32))


@pytest.mark.parametrize("slots", [0, 1, 40 + UNIT - 1])
def test_too_few_slots_are_refused(slots: int) -> None:
    with pytest.raises(BudgetError, match=rf"0\.ffn has memory for {slots} neurons.*takes 168 at least"):
        fake_cache(500, slots, 40)


@pytest.mark.parametrize("rows", [[3, 3], [4, 2], [-1, 5], [0, 500]])
def test_rows_that_no_predictor_should_name(rows: list[int]) -> None:
    cache, _ = fake_cache(500, 200, 40)
    with pytest.raises(ValueError, match="ascending rows below 500"):
        list(cache.ensure(np.array(rows, np.int32)))


def test_a_mixture_is_refused() -> None:
    layer = Layer(Attention(1, 1, 8, 0.4), Ffn(9, "silu", experts=3, experts_per_token=1))
    tensor = pack_layout(ModelSpec("moe", 16, 20, (layer,), 32), Codec.INT8).tensors["0.ffn"]
    with pytest.raises(ValueError, match="mixture"):
        RowCache(FakeReader(tensor), Trusting(), tensor, np.zeros((9, tensor.stride), np.uint8), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("strike", range(1, 60))
def test_an_interrupt_between_any_two_steps(strike: int) -> None:
    """What is there afterwards is right, and everything can be had again."""
    cache, _ = fake_cache(500, 300, 40)
    taken(cache, some(1, 500, 200))
    cache.prefetch(some(2, 500, 100))
    steps = 0

    def interrupt(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        nonlocal steps
        if frame.f_code.co_filename != rows_module.__file__:
            return None
        steps += event == "line" and frame.f_code.co_name != "_rebuild"
        if steps == strike:
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        taken(cache, some(3, 500, 250))
    except KeyboardInterrupt:
        cache.abandon()  # as the engine does when a pass ends early
    finally:
        sys.settrace(None)
    assert np.array_equal(np.flatnonzero(cache._row_in >= 0), np.sort(cache._slot_of[cache._slot_of >= 0]))
    for seed in range(4, 8):
        taken(cache, some(seed, 500, 230))


def test_index_bytes() -> None:
    for neurons, slots, pinned in ((500, 200, 40), (300, 300, 300), (700, 400, 0)):
        cache, _ = fake_cache(neurons, slots, pinned)
        arrays = [value for value in vars(cache).values() if isinstance(value, np.ndarray)]
        kept = sum(a.nbytes for a in arrays if a is not cache.memory)
        assert kept == index_bytes(neurons, slots, pinned)


@pytest.fixture
def pack(make_pack: MakePack) -> Pack:
    return Pack(make_pack(spec(700), Codec.INT8, block_bytes=1))


@pytest.fixture
def reader(pack: Pack) -> Iterator[Reader]:
    opened = Reader(pack)
    yield opened
    opened.close()


def real_cache(pack: Pack, reader: Reader, slots: int, pinned: int) -> RowCache:
    tensor = pack.layout.tensors["0.ffn"]
    verifier = Verifier(reader, np.frombuffer(mmap.mmap(-1, tensor.max_block_bytes), np.uint8))
    memory = np.frombuffer(mmap.mmap(-1, slots * tensor.stride), np.uint8).reshape(slots, tensor.stride)
    cache = RowCache(reader, verifier, tensor, memory, pinned)
    cache.load()
    return cache


def on_disk(pack: Pack) -> np.ndarray:
    tensor = pack.layout.tensors["0.ffn"]
    raw = (pack.path / tensor.file).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    return np.frombuffer(raw, np.uint8).reshape(-1, tensor.stride)


@pytest.mark.parametrize(("slots", "pinned"), [(260, 129), (260, 0), (128, 0), (700, 700), (700, 512)])
def test_rows_of_a_pack_equal_the_file(pack: Pack, reader: Reader, slots: int, pinned: int) -> None:
    cache, expected = real_cache(pack, reader, slots, pinned), on_disk(pack)
    assert cache.memory[:pinned].tobytes() == expected[:pinned].tobytes()
    for seed in range(30):
        rows = some(seed, 700, 20 * (seed % 15))
        cache.prefetch(some(seed + 1, 700, 150))
        for part, places in cache.ensure(rows):
            assert cache.memory[places].tobytes() == expected[part].tobytes()
        cache.check_integrity()
    assert cache.statistics.bytes_read >= (0 if pinned == 700 else cache.statistics.bytes_wanted > 0)


@pytest.mark.parametrize(("slots", "pinned"), [(700, 700), (260, 129), (128, 0), (430, 300)])
def test_a_result_does_not_depend_on_the_cache(pack: Pack, reader: Reader, slots: int, pinned: int) -> None:
    """Bit for bit: with all rows in memory, and with a window that has seen other tokens."""
    bias = np.random.default_rng(0).standard_normal(700).astype(np.float32)
    cache, everything = real_cache(pack, reader, slots, pinned), on_disk(pack)[:700]
    for seed in range(6):
        x = np.random.default_rng(seed).standard_normal((2, 20)).astype(np.float32)
        rows = some(seed, 700, 100 * seed + 30)
        expected, found = np.zeros((2, 20), np.float32), np.zeros((2, 20), np.float32)
        cpu.glu(x, FfnWeights(everything, Codec.INT8, "relu", False, bias[rows]), expected, slots=rows)
        for part, places in cache.ensure(rows):
            cpu.glu(x, FfnWeights(cache.memory, Codec.INT8, "relu", False, bias[part]), found, slots=places)
        assert np.abs(expected).sum() > 0
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("pinned", [0, 400])
def test_damage_is_found_before_a_row_is_used(pack: Pack, reader: Reader, pinned: int) -> None:
    tensor = pack.layout.tensors["0.ffn"]
    place = tensor.offset + 290 * tensor.stride + 5
    with open(pack.path / tensor.file, "r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1]))
    rows = np.array([1, 289], np.int32)  # not even the damaged row itself
    with pytest.raises(PackError, match=rf"block {290 // tensor.block_bundles} of 0\.ffn"):
        list(real_cache(pack, reader, 600, pinned).ensure(rows))


def test_a_file_cut_short_while_in_use(pack: Pack, reader: Reader) -> None:
    cache, tensor, expected = real_cache(pack, reader, 400, 30), pack.layout.tensors["0.ffn"], on_disk(pack)
    everything = np.arange(700, dtype=np.int32)
    for _ in cache.ensure(everything):  # every block has been checked
        pass
    for _ in cache.ensure(everything[:300]):
        pass
    with open(pack.path / tensor.file, "r+b") as handle:
        handle.truncate(tensor.offset + 512 * tensor.stride)
    with pytest.raises(PackError, match="cut short"):
        list(cache.ensure(everything[500:600]))
    cache.check_integrity()
    assert not (cache._row_in >= 500).any()
    for part, places in cache.ensure(everything[:350]):
        assert cache.memory[places].tobytes() == expected[part].tobytes()
