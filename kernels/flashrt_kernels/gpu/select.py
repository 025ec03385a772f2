"""Rows chosen by the scores of a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.row_list import BLOCK, RowList, counted_before


@triton.jit
def _chosen(scores_ptr, row, rows, threshold):
    """1 for each row whose score is above the threshold, or NaN: what is not known is not dropped."""
    score = tl.load(scores_ptr + row, mask=row < rows, other=0.0)
    return tl.where((row < rows) & ~(score <= threshold), 1, 0)


@triton.jit(do_not_specialize=["rows"])
def _count_chosen_kernel(scores_ptr, blocks_ptr, rows, threshold, BLOCK: tl.constexpr):
    """blocks[p] = rows chosen in the p-th BLOCK. Grid (blocks)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(blocks_ptr + tl.program_id(0), tl.sum(_chosen(scores_ptr, row, rows, threshold), axis=0))


@triton.jit(do_not_specialize=["rows"])
def _write_chosen_kernel(
    scores_ptr,
    blocks_ptr,
    items_ptr,
    count_ptr,
    rows,
    threshold,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """items = the rows chosen, in order; count = how many. Grid (blocks)."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    chosen = _chosen(scores_ptr, row, rows, threshold)
    before = counted_before(blocks_ptr, block, BLOCKS)
    tl.store(items_ptr + before + tl.cumsum(chosen, axis=0) - 1, row, mask=chosen > 0)
    if block == tl.num_programs(0) - 1:
        tl.store(count_ptr, before + tl.sum(chosen, axis=0))


def select_rows(scores: Tensor, threshold: float, out: RowList | None = None) -> RowList:
    """The rows that are scored above the threshold, or with NaN, ascending.

    scores float32 [n], n of at least 1. out: a list of n items to write into; None allocates.
    """
    device = scores.device
    check("scores", scores, torch.float32, (None,), device)
    rows = len(scores)
    if rows == 0:
        raise ValueError("scores: expected at least one row, found none")
    if out is None:
        out = RowList.empty(rows, device)
    check("out", out.items, torch.int32, (rows,), device)
    blocks = triton.cdiv(rows, BLOCK)
    _count_chosen_kernel[(blocks,)](scores, out.blocks, rows, threshold, BLOCK=BLOCK)
    _write_chosen_kernel[(blocks,)](
        scores,
        out.blocks,
        out.items,
        out.count,
        rows,
        threshold,
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
    )
    return out
