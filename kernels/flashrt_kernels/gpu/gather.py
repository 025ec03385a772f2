"""Rows fetched from host memory by the GPU itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check, check_readable
from flashrt_kernels.rows import ALIGNMENT

BLOCK = 1024  # words of 8 bytes that a program moves at a time


@triton.jit(do_not_specialize=["capacity"])
def _gather_kernel(
    rows_ptr, indices_ptr, out_ptr, slots_ptr, count_ptr, capacity, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[slots[i]] = rows[indices[i]], rows of WORDS words. Grid (capacity)."""
    i = tl.program_id(0)
    count = capacity
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), capacity)
    if i >= count:
        return
    source = rows_ptr.to(tl.pointer_type(tl.int64)) + tl.load(indices_ptr + i).to(tl.int64) * WORDS
    target = out_ptr.to(tl.pointer_type(tl.int64)) + tl.load(slots_ptr + i).to(tl.int64) * WORDS
    for first in range(0, WORDS, BLOCK):
        word = first + tl.arange(0, BLOCK)
        tl.store(target + word, tl.load(source + word, mask=word < WORDS), mask=word < WORDS)


def check_source(name: str, rows: Tensor, device: torch.device) -> None:
    """Raise ValueError unless `gather_rows` can read `rows` from `device`."""
    check(name, rows, torch.uint8, (None, None), rows.device)
    if rows.shape[1] == 0 or rows.shape[1] % ALIGNMENT:
        raise ValueError(f"{name}: expected rows of a multiple of {ALIGNMENT} bytes, found {rows.shape[1]}")
    check_readable(name, rows, device)


def gather_rows(rows: Tensor, indices: Tensor, out: Tensor, slots: Tensor, count: Tensor | None = None) -> None:
    """out[slots[i]] = rows[indices[i]] for the first `count` i.

    rows uint8 [n, stride], stride a multiple of 64, in pinned host memory, which the GPU reads over the bus, or on the
    device. out uint8 [m, stride], indices int64 or int32 [s], slots int32 [s], each slot at most once, and count int32
    [1] (None: all s) on the device. Values of indices and slots are not checked. Raises ValueError on anything else.
    """
    device = out.device
    check("out", out, torch.uint8, (None, None), device)
    check_source("rows", rows, device)
    stride = rows.shape[1]
    if out.shape[1] != stride:
        raise ValueError(f"out: expected rows of {stride} bytes, found {out.shape[1]}")
    check("indices", indices, torch.int32 if indices.dtype == torch.int32 else torch.int64, (None,), device)
    check("slots", slots, torch.int32, tuple(indices.shape), device)
    if count is not None:
        check("count", count, torch.int32, (1,), device)
    if len(indices):
        _gather_kernel[(len(indices),)](rows, indices, out, slots, count, len(indices), WORDS=stride // 8, BLOCK=BLOCK)
