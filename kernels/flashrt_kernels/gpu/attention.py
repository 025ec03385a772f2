"""Attention of decode steps over lists of tokens that lie in two memories."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check, check_readable
from flashrt_kernels.limits import ATTENTION_SEGMENT, WIDEST_HEAD

SEGMENTS = 16  # that are merged at a time
TILE = 4096  # numbers of keys that a program takes at a time, of 64 tokens at most
LEAST = 16  # queries and numbers of a head: the smallest matrices that tensor cores multiply


@triton.jit
def _load(pair, offset, inside, HALF: tl.constexpr):
    """Numbers of keys or values, float32, at `offset` of pointers to pairs; zeros where not `inside`."""
    if HALF:  # widened by hand: numpy, behind the interpreter, has no bfloat16
        bits = tl.load(pair.to(tl.pointer_type(tl.uint16)) + offset, mask=inside, other=0)
        x = (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = tl.load(pair + offset, mask=inside, other=0.0)
    return x


@triton.jit(do_not_specialize=["slots", "most"])
def _segment_kernel(
    q_ptr,
    near_ptr,
    far_ptr,
    lists_ptr,
    counts_ptr,
    parts_ptr,
    slots,
    most,
    scale,
    softcap,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    CAPPED: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """parts[segment, row, head] = values weighed by exp(score - highest), the highest score, the sum of the weights.

    Of the tokens of one segment of a list; nothing where there are none. Grid (segments, rows, KV heads).
    """
    segment, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(2)
    place = row.to(tl.int64) * kv_heads + head
    count = tl.minimum(tl.load(counts_ptr + place), most)
    if segment * SEGMENT >= count:
        return
    query, d = tl.arange(0, QUERIES), tl.arange(0, DIM_PADDED)
    known = (query < GROUP)[:, None] & (d < DIM)[None, :]
    q = tl.load(q_ptr + (place * GROUP + query)[:, None] * DIM + d[None, :], mask=known, other=0.0)
    best = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, DIM_PADDED), tl.float32)
    for tile in range(segment * SEGMENT, tl.minimum(count, (segment + 1) * SEGMENT), TILE):
        index = tile + tl.arange(0, TILE)
        listed = index < count
        token = tl.load(lists_ptr + place * most + index, mask=listed, other=0).to(tl.int64)
        pair = near_ptr + (head.to(tl.int64) * slots + token) * 2 * DIM
        if far_ptr is not None:
            pair = tl.where(token < 0, far_ptr + (-1 - token) * 2 * DIM, pair)
        inside = listed[:, None] & (d < DIM)[None, :]
        keys = _load(pair[:, None], d[None, :], inside, HALF)
        values = _load(pair[:, None], DIM + d[None, :], inside, HALF)
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * scale
        if CAPPED:  # tanh(|z|) = (1 - exp(-2 |z|)) / (1 + exp(-2 |z|))
            shrunk = tl.exp(-2.0 * tl.abs(scores) / softcap)
            capped = softcap * (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0.0, -capped, capped)
        scores = tl.where(listed[None, :], scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp(scores - highest[:, None])
        shrink = tl.exp(best - highest)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.dot(weights, values, input_precision="tf32x3")
        best = highest
    at = ((segment.to(tl.int64) * tl.num_programs(1) + row) * kv_heads + head) * GROUP + query
    out = parts_ptr + at * (DIM + 2)
    tl.store(out[:, None] + d[None, :], sums, mask=known)
    tl.store(out + DIM, best, mask=query < GROUP)
    tl.store(out + DIM + 1, total, mask=query < GROUP)


@triton.jit(do_not_specialize=["most"])
def _merge_kernel(
    parts_ptr,
    counts_ptr,
    sinks_ptr,
    out_ptr,
    most,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """out[row, head] = the segments' parts, merged in their order, behind the head's sink. Grid (rows, heads)."""
    row, heads = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    place = row * heads + tl.program_id(1)
    d = tl.arange(0, DIM_PADDED)
    best = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    if sinks_ptr is not None:
        best = tl.load(sinks_ptr + tl.program_id(1))
        total += 1.0
    sums = tl.zeros((DIM_PADDED,), tl.float32)
    segments = tl.cdiv(tl.minimum(tl.load(counts_ptr + place // GROUP), most), SEGMENT)
    for tile in range(0, segments, SEGMENTS):  # several, so that many loads are in flight together
        segment = tile + tl.arange(0, SEGMENTS)
        there = segment < segments
        part = parts_ptr + (segment * tl.num_programs(0).to(tl.int64) * heads + place) * (DIM + 2)
        own = tl.load(part + DIM, mask=there, other=float("-inf"))
        highest = tl.maximum(best, tl.max(own, axis=0))
        shrink, factors = tl.exp(best - highest), tl.exp(own - highest)
        total = total * shrink + tl.sum(tl.load(part + DIM + 1, mask=there, other=0.0) * factors, axis=0)
        inside = there[:, None] & (d < DIM)[None, :]
        values = tl.load(part[:, None] + d[None, :], mask=inside, other=0.0)
        sums = sums * shrink + tl.sum(values * factors[:, None], axis=0)
        best = highest
    tl.store(out_ptr + place * DIM + d, sums / tl.where(segments > 0, total, 1.0), mask=d < DIM)


def attention_list(
    q: Tensor,
    near: Tensor,
    far: Tensor | None,
    lists: Tensor,
    counts: Tensor,
    scale: float,
    softcap: float | None,
    out: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """`attention_list` of `flashrt_kernels.ops`: q over a list of tokens for each row and KV head.

    q float32 [T, H, D], D up to 576; near [KVH, slots, 2, D] and far [tokens, 2, D], both bfloat16 or float32. Either
    lies on the device or in pinned host memory (`tensor.pin_memory()`): CUDA maps pinned pages into the device's
    addresses, Triton hands kernels the mapped pointer, and each chosen token crosses the bus alone, D * 2 numbers in a
    run. lists int32 [T, KVH, most] and counts int32 [T, KVH] lie on the device, and their values are not checked: i >=
    0 is near[head, i], -1 - i is far[i]. out float32 [T, H * D]. sinks float32 [H]: a score of each head whose value is
    zero. Raises ValueError on anything else.

    Segments of 256 of a list are summed side by side and merged in order: a row's bits depend neither on other rows,
    nor on where its tokens lie, nor on `most`.
    """
    tokens, heads, dim = _check(q, near, far, lists, counts, out)
    if sinks is not None:
        check("sinks", sinks, torch.float32, (heads,), q.device)
    kv_heads, most = near.shape[0], lists.shape[2]
    if tokens == 0:
        return
    segments = triton.cdiv(most, ATTENTION_SEGMENT)
    parts = torch.empty((segments, tokens, heads, dim + 2), dtype=torch.float32, device=q.device)
    group, padded = heads // kv_heads, max(triton.next_power_of_2(dim), LEAST)
    if segments:
        _segment_kernel[(segments, tokens, kv_heads)](
            q,
            near,
            far,
            lists,
            counts,
            parts,
            near.shape[1],
            most,
            scale,
            softcap or 0.0,
            GROUP=group,
            QUERIES=max(triton.next_power_of_2(group), LEAST),
            DIM=dim,
            DIM_PADDED=padded,
            HALF=near.dtype == torch.bfloat16,
            CAPPED=bool(softcap),
            SEGMENT=ATTENTION_SEGMENT,
            TILE=max(min(TILE // padded, 64), LEAST),
            num_stages=1,  # the tiles of other programs hide what a load takes, and a GPU's shared memory is small
        )
    shape = {"GROUP": group, "DIM": dim, "DIM_PADDED": padded, "SEGMENT": ATTENTION_SEGMENT, "SEGMENTS": SEGMENTS}
    _merge_kernel[(tokens, heads)](parts, counts, sinks, out, most, **shape)


def _check(
    q: Tensor, near: Tensor, far: Tensor | None, lists: Tensor, counts: Tensor, out: Tensor
) -> tuple[int, int, int]:
    """The shape of q."""
    device = q.device
    check("q", q, torch.float32, (None, None, None), device)
    tokens, heads, dim = q.shape
    if not 1 <= dim <= WIDEST_HEAD:
        raise ValueError(f"q: expected heads of 1 to {WIDEST_HEAD} numbers, found {dim}")
    dtype = torch.bfloat16 if near.dtype == torch.bfloat16 else torch.float32
    check("near", near, dtype, (None, None, 2, dim), near.device)
    check_readable("near", near, device)
    kv_heads = near.shape[0]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"near: expected a divisor of {heads} heads, found {kv_heads}")
    if far is not None:
        check("far", far, dtype, (None, 2, dim), far.device)
        check_readable("far", far, device)
    check("lists", lists, torch.int32, (tokens, kv_heads, None), device)
    check("counts", counts, torch.int32, (tokens, kv_heads), device)
    check("out", out, torch.float32, (tokens, heads * dim), device)
    return tokens, heads, dim
