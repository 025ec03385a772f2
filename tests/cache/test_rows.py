"""The row cache against a dict, under random traces, with reads that come late, out of order, or never."""

from __future__ import annotations

import mmap
from collections import OrderedDict, deque
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.cache.rows import RowCache, index_bytes, least_slots
from flashrt.cache.verification import Verifier
from flashrt.errors import BudgetError, DiskError, PackError
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.layout import TensorLayout, pack_layout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
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
    bias = np.random.default_rng(neurons).standard_normal(neurons).astype(np.float32)
    cache = RowCache(reader, Trusting(), tensor, memory, pinned, bias)  # type: ignore[arg-type]
    memory[:pinned] = content(np.arange(pinned), tensor.stride)
    return cache, reader


def taken(cache: RowCache, rows: np.ndarray) -> list[int]:
    """Go through the passes of `rows`, checking each; the sizes of the passes."""
    found, sizes = [], []
    for part, slots in cache.ensure(rows):
        assert cache.memory[slots].tobytes() == content(part, cache.tensor.stride).tobytes()
        assert cache.slot_bias is not None
        assert cache._bias is not None
        assert (cache.slot_bias[slots[slots >= cache.pinned]] == cache._bias[part[slots >= cache.pinned]]).all()
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
        self.held.update(dict.fromkeys(unpinned))
        return missing


actions = st.lists(
    st.tuples(st.sampled_from(["ensure", "ensure", "prefetch", "arrive", "fail", "abandon", "leave"]), st.integers(0, 40)),
    max_size=40,
)


@given(st.integers(0, 150), st.integers(0, 120), actions)
@settings(max_examples=300, deadline=None)
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
            assert sum(reader.requests[before:], []) == model.use(rows.tolist())
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
