"""Decoding of weight rows (`flashrt_kernels.rows`) inside a kernel.

A tile is [S, G, 32]: S rows, G groups of 32 neighbouring weights. All codecs are met as w = scale * q - offset, with
one scale and one offset per row and group, so that products are summed over a group before they are scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_codes(row, valid, group, CODEC: tl.constexpr, GROUPS: tl.constexpr):
    """q float32 [S, G, 32] of the groups `group` int32 [G] of rows that begin at `row` (pointers uint8 [S]).

    Rows that are not `valid` bool [S] and groups beyond the GROUPS of a row are zeros, and not read.
    """
    lane = tl.arange(0, 32)[None, None, :]
    g = group[None, :, None]
    start = row[:, None, None]
    mask = valid[:, None, None] & (g < GROUPS)
    if CODEC == "f32":
        q = tl.load(start.to(tl.pointer_type(tl.float32)) + g * 32 + lane, mask=mask, other=0.0)
    elif CODEC == "bf16":
        bits = tl.load(start.to(tl.pointer_type(tl.uint16)) + g * 32 + lane, mask=mask, other=0)
        q = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif CODEC == "int8":
        q = tl.load(start.to(tl.pointer_type(tl.int8)) + g * 32 + lane, mask=mask, other=0).to(tl.float32)
    else:
        span = g // 8
        width = tl.minimum(GROUPS - span * 8, 8)  # groups of the span: the last may be shorter
        byte = span * 128 + (lane // 16) * (8 * width) + (g % 8) * 8 + lane % 8
        codes = tl.load(start + byte, mask=mask, other=0).to(tl.int32)
        q = ((codes >> ((lane // 8) % 2 * 4)) & 15).to(tl.float32)
    return q


@triton.jit
def row_scales(row, valid, group, CODEC: tl.constexpr, GROUPS: tl.constexpr):
    """scale and offset, both float32 [S, G], of what `row_codes` gives."""
    g = group[None, :]
    start = row[:, None]
    mask = valid[:, None] & (g < GROUPS)
    if CODEC == "int8":
        bits = tl.load((start + GROUPS * 32).to(tl.pointer_type(tl.uint16)) + g // 2, mask=mask, other=0)
        scale = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        offset = tl.zeros_like(scale)
    elif CODEC == "int4":
        a = tl.load(start + GROUPS * 16 + g, mask=mask, other=0).to(tl.float32)
        b = tl.load(start + GROUPS * 17 + g, mask=mask, other=0).to(tl.float32)
        units = (row + GROUPS * 18).to(tl.pointer_type(tl.float32))
        scale = tl.load(units, mask=valid, other=0.0)[:, None] * a
        offset = tl.load(units + 1, mask=valid, other=0.0)[:, None] * b
    else:
        scale = tl.where(mask, 1.0, 0.0)
        offset = tl.zeros_like(scale)
    return scale, offset
