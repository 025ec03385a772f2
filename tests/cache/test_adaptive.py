"""Neurons whose place in memory follows the text, against a dictionary."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from types import FrameType

import numpy as np
import pytest

from flashrt.budget.claims.adaptive import group_rows, index_bytes
from flashrt.cache import adaptive as adaptive_module
from flashrt.cache.adaptive import SWAP_MARGIN, AdaptiveNeurons
from flashrt.storage.layout import PAGE, Block, TensorLayout
from flashrt_kernels.rows import Codec

BLOCKS_PER_CALL = 2


class FakeReader:
    """Copies from what is on disk, and remembers how much was asked for."""

    def __init__(self, disk: np.ndarray) -> None:
        self.disk, self.bytes = disk.reshape(-1), 0
        self.checked: set[int] = set()

    def verified(self, block: Block) -> bool:
        return block.index in self.checked

    def submit(self, block: Block, buffer: np.ndarray) -> str:
        buffer[:] = self.disk[block.offset : block.offset + block.nbytes]
        self.bytes += block.nbytes
        self.checked.add(block.index)
        return f"block {block.index}"

    def submit_rows(self, file: str, offsets: np.ndarray, out: np.ndarray, slots: np.ndarray) -> str:
        assert (np.diff(offsets) > 0).all()
        for offset, slot in zip(offsets.tolist(), slots.tolist(), strict=True):
            out[slot] = self.disk[offset : offset + out.shape[1]]
        self.bytes += len(slots) * out.shape[1]
        return "pages"


def make(neurons: int, stride: int, block_bundles: int, pinned_blocks: int) -> tuple[AdaptiveNeurons, FakeReader]:
    run_stride = -(-neurons * stride // PAGE) * PAGE // stride
    while run_stride * stride % PAGE:
        run_stride += 1
    tensor = TensorLayout("0.ffn", "f", 0, Codec.INT4, 20, 3, 1, neurons, run_stride, block_bundles, stride)
    disk = np.random.default_rng(neurons).integers(0, 256, (run_stride, stride)).astype(np.uint8)
    memory = disk[: pinned_blocks * block_bundles].copy()
    return AdaptiveNeurons(tensor, memory, BLOCKS_PER_CALL), FakeReader(disk)


def residents(rows: AdaptiveNeurons) -> np.ndarray:
    """The neurons in memory, in the order of their slots."""
    return rows.neurons_in(np.arange(rows.resident))


def run(rows: AdaptiveNeurons, reader: FakeReader, usage: np.ndarray, wide: bool) -> None:
    """One pass: all that kernels are given must be what is on disk."""
    expected = reader.disk.reshape(-1, rows.tensor.stride)
    wanted = list(rows.blocks(wide))
    ring = np.full((len(wanted) + 1, rows.tensor.max_block_bytes), 77, np.uint8)
    buffers = {block.index: ring[i + 1, : block.nbytes] for i, block in enumerate(wanted)}
    for i in range(0, len(wanted), 3):
        places = [(block, i + 1 + j) for j, block in enumerate(wanted[i : i + 3])]
        held = residents(rows)
        whole = [not ((block.first <= held) & (held < block.first + block.bundles)).any() for block, _ in places]
        whole = [own and block.index not in reader.checked for own, (block, _) in zip(whole, places, strict=True)]
        tickets = list(rows.submit(reader, places, ring))  # type: ignore[arg-type]
        assert tickets == [f"block {p[0].index}" if own else "pages" for p, own in zip(places, whole, strict=True)]
    assert (ring[0] == 77).all()
    if not wide:
        rows.choose_all()
    for span in rows.spans(wide):
        own = {block.index: buffers[block.index] for block in span if block.index in buffers}
        first, last = span[0].first, min(span[-1].first + span[-1].bundles, rows.neurons)
        if wide:
            (block,) = span
            found = rows.assemble(block, own[block.index]) if own else rows.direct(block)
            assert np.array_equal(found, expected[first:last])
            if last > first:
                rows.learn(first, usage[first:last], 1)
                rows.choose([block])
        else:
            gathered = rows.gather(span, own)
            assert gathered.first == first
            every = (
                np.concatenate([rows.memory, *gathered.streamed_bundles]) if gathered.streamed_bundles else rows.memory
            )
            places = np.where(gathered.slots < 0, len(rows.memory) - 1 - gathered.slots, gathered.slots)
            assert np.array_equal(every[places], expected[first:last])
        rows.exchange(span, own)
        rows.check_integrity()
    if not wide:
        rows.learn(0, usage, 1)
    assert np.array_equal(rows.memory[: rows.resident], expected[residents(rows)])


SHAPES = [(1100, 256, 128, 3), (896, 1024, 128, 2), (1001, 512, 256, 1), (640, 4096, 128, 4), (300, 40960, 128, 1)]


@pytest.mark.parametrize(("neurons", "stride", "block_bundles", "pinned"), SHAPES)
def test_passes_see_what_is_on_disk_wherever_it_is(neurons: int, stride: int, block_bundles: int, pinned: int) -> None:
    rows, reader = make(neurons, stride, block_bundles, pinned)
    random = np.random.default_rng(1)
    loved = random.permutation(neurons)[: rows.resident // 2]
    before = set(residents(rows).tolist())
    for i in range(30):
        usage = random.random(neurons).astype(np.float32) * 0.1
        usage[loved] += 5
        run(rows, reader, usage, wide=i % 5 == 4)
        drafted = rows.neurons_in(rows.drafted(0.3))
        assert len(drafted) == min(round(0.3 * neurons), rows.resident)
    assert set(residents(rows).tolist()) != before
    groups = rows.neurons // rows.group
    worth = rows.scores.reshape(groups, -1).sum(1)
    held = np.unique(residents(rows) // rows.group)
    outside = np.setdiff1d(np.arange(groups), held)
    assert worth[outside].max() <= 2 * SWAP_MARGIN * worth[held].min()  # all that deserves it by far is there by now


def test_nothing_moves_for_what_is_hardly_better() -> None:
    rows, reader = make(1024, 1024, 128, 4)
    usage = np.ones(1024, np.float32)
    usage[600:] = 1.1
    for wide in (False, True, False, False):
        run(rows, reader, usage, wide)
    assert np.array_equal(residents(rows), np.arange(512))
    whole = reader.bytes
    assert whole == 4 * 512 * 1024  # what is resident was never read


def test_only_so_many_move_in_a_pass_of_few_tokens() -> None:
    rows, reader = make(1024, 4096, 128, 4)
    usage = np.ones(1024, np.float32)
    usage[512:] = 9
    run(rows, reader, usage, wide=False)
    for passes in range(1, 5):
        run(rows, reader, usage, wide=False)
        moved = np.count_nonzero(residents(rows) >= 512) // rows.group
        assert 0 < moved <= passes * rows.moves


def test_groups_are_large_enough_and_whole() -> None:
    for neurons, stride, block_bundles, _ in SHAPES:
        rows, _ = make(neurons, stride, block_bundles, 1)
        assert neurons % rows.group == 0
        assert block_bundles % rows.group == 0
        assert rows.group == group_rows(rows.tensor, len(rows.memory))
    assert make(8960, 2624, 384, 11)[0].group == 16
    assert make(8960, 2624, 384, 12)[0].group == 64  # 41 pages


def struck(act: Callable[[], None], within: str, strike: int) -> bool:
    """Whether an interrupt struck: before the line that comes `strike`-th in a method and in what it calls here."""
    inside = steps = 0

    def interrupt(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        nonlocal inside, steps
        if frame.f_code.co_filename != adaptive_module.__file__:
            return None
        if frame.f_code.co_name == within:
            inside += (event == "call") - (event == "return")
        steps += event == "line" and inside > 0
        if steps == strike:
            sys.settrace(None)
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("strike", range(1, 24))  # the lines of a move
def test_an_interrupt_between_any_two_steps_of_a_move(strike: int, wide: bool) -> None:
    """Also those of its repair: what is in memory is right afterwards, and everything can be had."""
    rows, reader = make(896, 1024, 128, 3)
    random = np.random.default_rng(strike)
    usage = np.where(np.arange(896) < rows.resident, 1, 9).astype(np.float32) * random.random(896).astype(np.float32)
    rows.learn(0, usage, 1)
    assert struck(lambda: run(rows, reader, usage, wide), "_move_in", strike)
    for again in count(1):
        if not struck(rows.forget_reads, "forget_reads", again):
            break
    rows.check_integrity()
    assert np.array_equal(rows.memory[: rows.resident], reader.disk.reshape(-1, 1024)[residents(rows)])
    for later in (False, True, False):
        run(rows, reader, random.random(896).astype(np.float32), later)


def test_index_bytes() -> None:
    rows, reader = make(8960, 2624, 384, 9)
    run(rows, reader, np.random.default_rng(0).random(8960).astype(np.float32), wide=False)
    run(rows, reader, np.random.default_rng(1).random(8960).astype(np.float32), wide=False)
    rows.drafted(0.5)
    kept = [value for value in vars(rows).values() if isinstance(value, np.ndarray)]
    kept += [rows._missing_pages()[0], *rows._page_groups]
    shared = {id(rows.memory), id(rows._memory)}
    assert sum(array.nbytes for array in kept if id(array) not in shared) <= index_bytes(rows.tensor)
