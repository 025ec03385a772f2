"""The cache of experts against a dictionary, under random traces, with reads that are late, fail, or are cancelled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.cache.experts import ExpertCache, Key
from flashrt.errors import DiskError, UsageError
from flashrt.storage.layout import Block

LAYERS, EXPERTS, CHOSEN = 3, 6, 2
BLOCKS, NBYTES = 3, 8


def blocks_of(layer: int, expert: int) -> tuple[Block, ...]:
    """The last one is shorter; an expert whose blocks are all pinned has none."""
    if (layer, expert) == (2, 5):
        return ()
    first = (layer * EXPERTS + expert) * BLOCKS
    return tuple(Block("w", first + i, "f", 0, NBYTES - (i == BLOCKS - 1), i, 1) for i in range(BLOCKS))


def content(layer: int, expert: int) -> bytes:
    return b"".join(bytes([block.index + 1]) * block.nbytes for block in blocks_of(layer, expert))


class LateReading:
    """Writes when told to, or when somebody waits; a read that has `begun` writes even when it was cancelled."""

    def __init__(self, block: Block, memory: np.ndarray, begun: bool) -> None:
        assert len(memory) == block.nbytes
        self.block, self.memory, self.begun = block, memory, begun
        self.ready = self.cancelled = False
        self.error: Exception | None = None

    def arrive(self, error: Exception | None = None) -> None:
        if not self.ready and (self.begun or not self.cancelled):
            self.memory[:] = self.block.index + 1
            self.error = error
        self.ready = True

    def wait(self) -> None:
        self.arrive()
        if self.error is not None:
            raise self.error
        if self.cancelled:
            raise UsageError("cancelled")

    def cancel(self) -> None:
        self.cancelled = not self.ready


class FakeDevice:
    def __init__(self) -> None:
        self.reads: list[LateReading] = []

    def read(self, block: Block, memory: np.ndarray) -> LateReading:
        self.reads.append(LateReading(block, memory, begun=len(self.reads) % 3 > 0))
        return self.reads[-1]

    def settle(self) -> None:
        for reading in self.reads:
            reading.arrive()


def make_cache(slots: int, ahead: int = 2) -> tuple[ExpertCache, FakeDevice]:
    device = FakeDevice()
    cache = ExpertCache(device, np.zeros((slots, BLOCKS * NBYTES), np.uint8), blocks_of, (LAYERS, EXPERTS))  # type: ignore[arg-type]
    cache._ahead = ahead
    return cache, device


def whole(cache: ExpertCache) -> dict[Key, bytes]:
    """What is in memory, by the cache's account."""
    return {
        slot.key: slot.memory[: sum(block.nbytes for block in slot.blocks)].tobytes()
        for slot in cache._slots
        if slot.key is not None and slot.complete
    }


def check(cache: ExpertCache) -> None:
    cache.check_integrity()
    assert all(found == content(*key) for key, found in whole(cache).items())


def take(cache: ExpertCache, layer: int, expert: int) -> bytes:
    return b"".join(part.tobytes() for _, part in cache.take(layer, expert))


def chosen(*rows: list[int]) -> np.ndarray:
    return np.array(rows)


layers = st.integers(0, LAYERS - 1)
routes = st.lists(st.permutations(range(EXPERTS)).map(lambda order: order[:CHOSEN]), min_size=1, max_size=4)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("expect"), layers, routes),
        st.tuples(st.just("prefetch"), layers, st.permutations(range(EXPERTS)).map(lambda order: order[:CHOSEN])),
        st.tuples(st.just("take"), st.just(0), st.none()),
        st.tuples(st.just("take"), st.just(0), st.none()),
        st.tuples(st.just("arrive"), st.integers(0, 40), st.none()),
        st.tuples(st.just("fail"), st.integers(0, 5), st.none()),
        st.tuples(st.just("abandon"), st.just(0), st.none()),
    ),
    max_size=60,
)


@given(st.integers(1, 8), st.integers(1, 3), actions)
@settings(max_examples=300, deadline=None)
def test_against_a_dictionary(slots: int, ahead: int, trace: list) -> None:
    cache, device = make_cache(slots, ahead)
    expected = {(i, e): content(i, e) for i in range(LAYERS) for e in range(EXPERTS)}
    wanted: list[Key] = []
    named = 0
    for action, n, what in trace:
        flying = [reading for reading in device.reads if not reading.ready]
        try:
            if action == "expect":
                wanted = [(n, expert) for expert in sorted({e for row in what for e in row})]
                named += len(wanted)
                cache.expect(n, np.array(what))
            elif action == "prefetch":
                cache.prefetch(n, what)
            elif action == "take" and wanted:
                key = wanted.pop(0)
                assert take(cache, *key) == expected[key]
            elif action == "arrive" and n < len(flying):
                flying[n].arrive()  # reads end in any order
            elif action == "fail" and n < len(flying):
                flying[n].arrive(DiskError("broken"))
            elif action == "abandon":
                wanted = []
                cache.abandon()
        except DiskError:
            wanted = []
            cache.abandon()
            assert all(reading.ready for reading in device.reads)
        cache.check_integrity()
        assert cache.counts["hits"] + cache.counts["misses"] <= named
        assert cache.counts["useful"] <= cache.counts["prefetched"]
        for slot in cache._slots:
            done = sum(block.nbytes for block in slot.blocks[: slot.loaded])
            assert slot.key is None or slot.memory[:done].tobytes() == expected[slot.key][:done]


def test_what_is_taken_stays_though_it_is_guessed_again() -> None:
    """With a single slot: neither what is waited for nor a guess may have it while it is in use."""
    cache, device = make_cache(1)
    cache.expect(0, chosen([0, 1]))
    device.settle()
    parts = cache.take(0, 0)
    cache.prefetch(0, [0])
    assert b"".join(part.tobytes() for _, part in itertools.islice(parts, BLOCKS)) == content(0, 0)
    assert next(parts, None) is None
    device.settle()
    assert take(cache, 0, 1) == content(0, 1)


def test_what_is_waited_for_may_be_guessed_too() -> None:
    cache, device = make_cache(1)
    cache.expect(1, chosen([0, 1]))
    cache.prefetch(1, [0, 1])
    device.settle()
    assert [take(cache, 1, e) for e in (0, 1)] == [content(1, 0), content(1, 1)]


def test_what_is_in_memory_is_not_read_again() -> None:
    cache, device = make_cache(4)
    for _ in range(3):
        cache.expect(0, chosen([3, 1]))
        assert [take(cache, 0, e) for e in (1, 3)] == [content(0, 1), content(0, 3)]
    assert len(device.reads) == 2 * BLOCKS
    assert cache.counts == {"hits": 4, "misses": 2, "useful": 0}


def test_taking_out_of_turn_is_a_bug_of_the_caller() -> None:
    cache, _ = make_cache(4)
    cache.expect(0, chosen([3, 1]))
    with pytest.raises(RuntimeError, match="expert 3 of layer 0 was taken out of turn"):
        take(cache, 0, 3)


def test_blocks_are_given_out_as_they_arrive() -> None:
    cache, device = make_cache(2)
    cache.expect(1, chosen([0]))
    device.reads[0].arrive()
    device.reads[1].arrive()
    parts = cache.take(1, 0)
    assert [block.first for block in next(parts)[0]] == [0, 1]
    assert cache.wait_s == 0
    assert [block.first for block in next(parts)[0]] == [2]
    assert cache.wait_s > 0


def test_the_slots_are_filled_evenly_before_the_first_pass() -> None:
    cache, _ = make_cache(5)
    arrived: list[int] = []
    cache.fill(((i, e) for e in range(EXPERTS) for i in range(LAYERS)), arrived.append)
    assert whole(cache).keys() == {(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)}
    assert sum(arrived) == sum(len(content(*key)) for key in whole(cache))
    check(cache)


def test_a_right_guess_is_read_while_the_layer_before_computes() -> None:
    cache, device = make_cache(4)
    cache.expect(0, chosen([0, 1]))
    cache.prefetch(1, [5, 2])
    take(cache, 0, 0)
    take(cache, 0, 1)
    assert [reading.block for reading in device.reads[2 * BLOCKS :]] == [*blocks_of(1, 5), *blocks_of(1, 2)]
    device.settle()
    cache.expect(1, chosen([2, 5]))
    assert cache.counts == {"hits": 2, "misses": 2, "prefetched": 2, "useful": 2}
    assert len(device.reads) == 4 * BLOCKS


def test_a_wrong_guess_is_cancelled_and_leaves_its_slot() -> None:
    cache, device = make_cache(4, ahead=3)
    cache.expect(0, chosen([0]))
    cache.prefetch(1, [5, 2])
    guessed = device.reads[BLOCKS:]
    take(cache, 0, 0)
    cache.expect(1, chosen([2, 3]))
    assert [reading.cancelled for reading in guessed] == [True] * BLOCKS + [False] * BLOCKS
    assert (1, 5) not in cache
    assert take(cache, 1, 2) + take(cache, 1, 3) == content(1, 2) + content(1, 3)
    assert (cache.counts["prefetched"], cache.counts["useful"]) == (2, 1)
    check(cache)


def test_favourites_survive_a_prompt_that_needs_everything() -> None:
    cache, _ = make_cache(8, ahead=1)
    random = np.random.default_rng(0)
    for _ in range(50):
        for layer in range(LAYERS):
            named = random.choice(EXPERTS, 2, replace=False, p=[0.45, 0.45, 0.025, 0.025, 0.025, 0.025])
            cache.expect(layer, named[None])
            assert [take(cache, layer, e) for e in sorted(named)] == [content(layer, e) for e in sorted(named)]
    for layer in range(LAYERS):
        cache.expect(layer, chosen([0, 1], [0, 2], [0, 3], [1, 4], [0, 1]))
        for expert in range(5):
            assert take(cache, layer, expert) == content(layer, expert)
    assert whole(cache).keys() >= {(layer, expert) for layer in range(LAYERS) for expert in (0, 1)}


def test_a_failed_read_is_raised_where_the_expert_is_taken() -> None:
    cache, device = make_cache(4)
    cache.expect(0, chosen([0, 1]))
    assert take(cache, 0, 0) == content(0, 0)
    device.reads[BLOCKS + 1].arrive(DiskError("broken"))
    with pytest.raises(DiskError, match="broken"):
        take(cache, 0, 1)
    cache.abandon()
    check(cache)
    assert whole(cache).keys() == {(0, 0)}
    cache.expect(0, chosen([0, 1]))
    assert [take(cache, 0, e) for e in (0, 1)] == [content(0, 0), content(0, 1)]


@pytest.mark.parametrize("strike", range(12))
def test_an_interrupt_loses_nothing_but_what_was_on_its_way(strike: int) -> None:
    cache, device = make_cache(3)
    read, calls = device.read, iter(range(1000))

    def interrupted(block: Block, memory: np.ndarray) -> LateReading:
        if next(calls) == strike:
            raise KeyboardInterrupt
        return read(block, memory)

    device.read = interrupted  # type: ignore[method-assign]
    for layer in (0, 1, 0, 2):
        try:
            cache.expect(layer, chosen([1, 4]))
            assert take(cache, layer, 1) + take(cache, layer, 4) == content(layer, 1) + content(layer, 4)
        except KeyboardInterrupt:
            cache.abandon()
        check(cache)
