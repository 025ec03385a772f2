"""The ring of stream buffers against a queue, under random traces and with reads that finish late and out of order."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.cache.streamer import Place, Streamer
from flashrt.errors import DiskError
from flashrt.storage.layout import PAGE, Block
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels.rows import Codec
from tests.conftest import MakePack
from tests.fake_source import DENSE

SLOT = 64


def block(index: int, nbytes: int = SLOT) -> Block:
    return Block("w", index, "f", index * PAGE, nbytes, index, 1)


class FakeReader:
    """Fills a buffer with the block's index when told to, or when somebody waits for it."""

    def __init__(self) -> None:
        self.flying: deque[LateTicket] = deque()
        self.submitted: list[int] = []

    def submit(self, wanted: Block, buffer: np.ndarray) -> LateTicket:
        assert len(buffer) == wanted.nbytes
        ticket = LateTicket(wanted, buffer)
        self.flying.append(ticket)
        self.submitted.append(wanted.index)
        return ticket

    def settle(self) -> None:
        for ticket in self.flying:
            ticket.arrive()


class LateTicket:
    def __init__(self, block: Block, buffer: np.ndarray) -> None:
        self.block, self.buffer, self.ready = block, buffer, False
        self.error: Exception | None = None
        self.cancelled = False

    def arrive(self, error: Exception | None = None) -> None:
        if not self.ready and not self.cancelled:
            self.buffer[:] = self.block.index % 251
            self.error = error
        self.ready = True

    def wait(self) -> None:
        self.arrive()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.cancelled = True


def streamer(slots: int) -> tuple[Streamer, FakeReader]:
    reader = FakeReader()
    return Streamer(reader, np.zeros((slots, SLOT), np.uint8)), reader  # type: ignore[arg-type]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("expect"), st.integers(0, 6)),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("arrive"), st.integers(0, 5)),
        st.tuples(st.just("release"), st.just(0)),
        st.tuples(st.just("flush"), st.just(0)),
    ),
    max_size=60,
)


@given(st.integers(2, 5), actions)
@settings(max_examples=300, deadline=None)
def test_against_a_queue(slots: int, trace: list[tuple[str, int]]) -> None:
    ring, reader = streamer(slots)
    queue: deque[Block] = deque()
    held: tuple[np.ndarray, int] | None = None
    announced = 0
    for action, n in trace:
        if action == "expect":
            fresh = [block(announced + i, nbytes=SLOT - i) for i in range(n)]
            announced += n
            ring.expect(fresh)
            queue.extend(fresh)
        elif action == "take" and queue:
            wanted = queue.popleft()
            data = ring.take(wanted)
            assert data.tobytes() == bytes([wanted.index % 251]) * wanted.nbytes
            held = data, wanted.index
        elif action == "arrive" and n < len(reader.flying):
            reader.flying[n].arrive()  # reads finish in any order
        elif action == "release":
            ring.release()
            held = None
        elif action == "flush":
            ring.flush()
            queue.clear()
            held = None
        if held is not None:  # a block stays as it is until the next take, however many reads run ahead
            assert (held[0] == held[1] % 251).all()
        ahead = min(len(queue), slots - (held is not None))
        assert sum(not t.ready for t in reader.flying) <= slots
        assert reader.submitted[len(reader.submitted) - ahead :] == [b.index for b in queue][:ahead]
    assert reader.submitted == sorted(set(reader.submitted))


def test_reads_run_ahead_of_the_first_take() -> None:
    ring, reader = streamer(3)
    ring.expect(block(i) for i in range(10))
    assert reader.submitted == [0, 1, 2]


def test_taking_out_of_turn_is_a_bug_of_the_caller() -> None:
    ring, _ = streamer(2)
    blocks = [block(0), block(1)]
    ring.expect(blocks)
    with pytest.raises(RuntimeError, match="block 1 of w was taken out of turn"):
        ring.take(blocks[1])
    with pytest.raises(RuntimeError, match="out of turn"):
        streamer(2)[0].take(blocks[0])


def test_a_failed_read_is_raised_where_the_block_is_taken() -> None:
    ring, reader = streamer(2)
    blocks = [block(0), block(1), block(2)]
    ring.expect(blocks)
    reader.flying[0].arrive(DiskError("broken"))
    with pytest.raises(DiskError, match="broken"):
        ring.take(blocks[0])
    ring.flush()
    assert reader.flying[1].cancelled
    ring.expect(blocks[2:])
    assert (ring.take(blocks[2]) == 2).all()


def test_waiting_is_accounted_for() -> None:
    ring, reader = streamer(2)
    blocks = [block(0), block(1)]
    ring.expect(blocks)
    reader.flying[0].arrive()
    ring.take(blocks[0])
    assert ring.wait_s == 0
    ring.take(blocks[1])
    assert ring.wait_s > 0


def test_a_whole_pack_through_two_slots(make_pack: MakePack) -> None:
    pack = Pack(make_pack(DENSE, Codec.INT8, block_bytes=1))
    reader = Reader(pack)
    try:
        tensors = pack.layout.tensors.values()
        largest = max(t.max_block_bytes for t in tensors)
        assert largest % PAGE == 0
        ring = Streamer(reader, np.frombuffer(mmap.mmap(-1, 2 * largest), np.uint8).reshape(2, largest))
        wanted = [t.block(i) for t in tensors for i in range(t.blocks)] * 3
        ring.expect(wanted)
        for expected in wanted:
            raw = (pack.path / expected.file).read_bytes()
            assert ring.take(expected).tobytes() == raw[expected.offset : expected.offset + expected.nbytes]
    finally:
        reader.close()


def test_each_source_is_read_in_its_own_way() -> None:
    """A batch of reads never mixes sources, and what is found out as its turn comes is found out then."""
    ring, reader = streamer(6)
    batches: list[list[int]] = []
    asked: list[int] = []

    def parts(_: object, places: Sequence[Place], memory: np.ndarray) -> list[LateTicket]:
        batches.append([wanted.index for wanted, _ in places])
        return [reader.submit(wanted, memory[buffer, : wanted.nbytes]) for wanted, buffer in places]

    def lazily(first: int, count: int) -> Iterator[Block]:
        for index in range(first, first + count):
            asked.append(index)
            yield block(index)

    ring.expect([block(0), block(1)])
    ring.expect(lazily(2, 5), parts)  # type: ignore[arg-type]
    ring.expect([block(7)])
    assert batches == [[2, 3, 4, 5]]
    assert asked == [2, 3, 4, 5]
    for index in range(8):
        assert (ring.take(block(index)) == index).all()
    assert [index for batch in batches for index in batch] == [2, 3, 4, 5, 6]
    assert reader.submitted == list(range(8))
