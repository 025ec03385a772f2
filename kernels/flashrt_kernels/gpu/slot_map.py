"""Which row lies in which slot, kept and changed on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.row_list import BLOCK, RowList, counted_before


@triton.jit
def _slots_of(rows_ptr, count_ptr, slot_of_ptr, index):
    """Rows, their slots (-1: absent) and whether they count, at `index` of a list."""
    valid = index < tl.load(count_ptr)
    row = tl.load(rows_ptr + index, mask=valid, other=0)
    return row, tl.load(slot_of_ptr + row, mask=valid, other=-1), valid


@triton.jit
def _count_hits_kernel(rows_ptr, count_ptr, slot_of_ptr, blocks_ptr, BLOCK: tl.constexpr):
    """blocks[p] = rows of the p-th BLOCK that have slots. Grid (blocks)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _row, slot, _valid = _slots_of(rows_ptr, count_ptr, slot_of_ptr, index)
    tl.store(blocks_ptr + tl.program_id(0), tl.sum((slot >= 0).to(tl.int32), axis=0))


@triton.jit
def _split_kernel(
    rows_ptr,
    count_ptr,
    slot_of_ptr,
    blocks_ptr,
    needed_ptr,
    hits_ptr,
    hit_count_ptr,
    misses_ptr,
    miss_count_ptr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """hits = the slots of rows that have one, misses = the other rows; needed = 1 for each slot hit. Grid (blocks)."""
    block = tl.program_id(0)
    index = block * BLOCK + tl.arange(0, BLOCK)
    row, slot, valid = _slots_of(rows_ptr, count_ptr, slot_of_ptr, index)
    hit = (slot >= 0).to(tl.int32)
    before = counted_before(blocks_ptr, block, BLOCKS)
    position = before + tl.cumsum(hit, axis=0) - hit  # hits before this row
    tl.store(hits_ptr + position, slot, mask=slot >= 0)
    tl.store(needed_ptr + slot, hit.to(tl.uint8), mask=slot >= 0)
    tl.store(misses_ptr + index - position, row, mask=valid & (slot < 0))
    if block == tl.num_programs(0) - 1:
        hits = before + tl.sum(hit, axis=0)
        tl.store(hit_count_ptr, hits)
        tl.store(miss_count_ptr, tl.load(count_ptr) - hits)


@triton.jit
def _free(needed_ptr, position, hand, slots):
    """The slots at `position` of the ring that begins at the hand, and whether they may be taken (1 or 0)."""
    slot = (hand + position) % slots
    inside = position < slots
    return slot, tl.where(inside & (tl.load(needed_ptr + slot, mask=inside, other=1) == 0), 1, 0)


@triton.jit(do_not_specialize=["slots"])
def _count_free_kernel(needed_ptr, hand_ptr, blocks_ptr, slots, BLOCK: tl.constexpr):
    """blocks[p] = free slots in the p-th BLOCK of the ring. Grid (blocks)."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _slot, free = _free(needed_ptr, position, tl.load(hand_ptr), slots)
    tl.store(blocks_ptr + tl.program_id(0), tl.sum(free, axis=0))


@triton.jit(do_not_specialize=["slots"])
def _place_kernel(
    misses_ptr,
    count_ptr,
    needed_ptr,
    hand_ptr,
    next_hand_ptr,
    blocks_ptr,
    slot_of_ptr,
    row_of_ptr,
    out_ptr,
    slots,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out[i] = the i-th free slot of the ring, which is now misses[i]'s and no longer its row's. Grid (blocks)."""
    block = tl.program_id(0)
    position = block * BLOCK + tl.arange(0, BLOCK)
    slot, free = _free(needed_ptr, position, tl.load(hand_ptr), slots)
    rank = counted_before(blocks_ptr, block, BLOCKS) + tl.cumsum(free, axis=0) - 1
    count = tl.load(count_ptr)
    taken = (free > 0) & (rank < count)
    row = tl.load(misses_ptr + rank, mask=taken, other=0)
    old = tl.load(row_of_ptr + slot, mask=taken, other=-1)
    tl.store(slot_of_ptr + old, tl.full((BLOCK,), -1, tl.int32), mask=old >= 0)
    tl.store(slot_of_ptr + row, slot, mask=taken)
    tl.store(row_of_ptr + slot, row, mask=taken)
    tl.store(out_ptr + rank, slot, mask=taken)
    tl.store(next_hand_ptr + tl.zeros_like(slot), (slot + 1) % slots, mask=taken & (rank == count - 1))


@triton.jit
def _find_kernel(rows_ptr, count_ptr, slot_of_ptr, out_ptr, BLOCK: tl.constexpr):
    """out[i] = slot_of[rows[i]]. Grid (blocks)."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _row, slot, valid = _slots_of(rows_ptr, count_ptr, slot_of_ptr, index)
    tl.store(out_ptr + index, slot, mask=valid)


@dataclass(frozen=True, slots=True)
class SlotMap:
    """Rows and the slots that hold them, both ways round; -1 stands for none. All on the device.

    Slots are given out by a hand that goes round them and passes over those that are needed (the clock of page
    replacement, without a second chance: recency would cost a write per hit).
    """

    slot_of: Tensor  # int32 [rows]
    row_of: Tensor  # int32 [slots]
    needed: Tensor  # uint8 [slots]: 1 for the slots that `split` found last
    hand: Tensor  # int32 [1]: the slot that is looked at first
    next_hand: Tensor  # int32 [1]
    blocks: Tensor  # int32 [blocks of slots]: counts of free slots

    @classmethod
    def empty(cls, rows: int, slots: int, device: torch.device | str) -> SlotMap:
        """No row has a slot."""
        if not 1 <= slots <= rows:
            raise ValueError(f"slots: expected 1 to {rows}, as many as there are rows, found {slots}")
        return cls(
            torch.full((rows,), -1, dtype=torch.int32, device=device),
            torch.full((slots,), -1, dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.uint8, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.empty(triton.cdiv(slots, BLOCK), dtype=torch.int32, device=device),
        )

    def split(self, rows: RowList, hits: RowList, misses: RowList) -> None:
        """hits = the slots of those `rows` that have one, misses = those that have none, in the order of `rows`.

        The slots found are kept by the next `place`.
        """
        self._check("rows", rows.items)
        for name, out in (("hits", hits), ("misses", misses)):
            if len(out.items) < len(rows.items):
                raise ValueError(f"{name}: expected room for {len(rows.items)} items, found {len(out.items)}")
        self.needed.zero_()
        blocks = triton.cdiv(len(rows.items), BLOCK)
        _count_hits_kernel[(blocks,)](rows.items, rows.count, self.slot_of, hits.blocks, BLOCK=BLOCK)
        _split_kernel[(blocks,)](
            rows.items,
            rows.count,
            self.slot_of,
            hits.blocks,
            self.needed,
            hits.items,
            hits.count,
            misses.items,
            misses.count,
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(blocks),
        )

    def place(self, misses: RowList, out: Tensor) -> None:
        """Give each of the misses of the last `split` a slot: out int32 [at least as long as `misses`].

        Rows that were there lose theirs. There are slots enough, as what was split fits into the slots.
        """
        self._check("misses", misses.items)
        self._check("out", out, len(misses.items))
        blocks = len(self.blocks)
        _count_free_kernel[(blocks,)](self.needed, self.hand, self.blocks, len(self.row_of), BLOCK=BLOCK)
        _place_kernel[(blocks,)](
            misses.items,
            misses.count,
            self.needed,
            self.hand,
            self.next_hand,
            self.blocks,
            self.slot_of,
            self.row_of,
            out,
            len(self.row_of),
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(blocks),
        )
        self.hand.copy_(self.next_hand)  # not in the kernel: its programs all read the hand

    def find(self, rows: RowList, out: Tensor) -> None:
        """out int32 [at least as long as `rows`] = the slots of rows, in their order; -1 where there is none."""
        self._check("rows", rows.items)
        self._check("out", out, len(rows.items))
        grid = (triton.cdiv(len(rows.items), BLOCK),)
        _find_kernel[grid](rows.items, rows.count, self.slot_of, out, BLOCK=BLOCK)

    def _check(self, name: str, items: Tensor, least: int = 1) -> None:
        check(name, items, torch.int32, (None,), self.slot_of.device)
        if not least <= len(items) <= len(self.row_of):
            raise ValueError(f"{name}: expected room for {least} to {len(self.row_of)} items, found {len(items)}")
