"""The blocks of tokens that decode steps attend to, chosen by labels.

Chunks of labels are scored side by side. Each leaves the softmax of its own tokens: a query's highest score, its sum,
and that of each block. Chunks are then brought to a common softmax, and the heaviest blocks are found digit by digit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.gpu.key_labels import check_labels, label_channels, round_half_even
from flashrt_kernels.labels import LABEL_TOKENS

CHUNK = 256  # tokens that a program scores
CHUNKS = 4  # whose blocks a program weighs
PEAKS = 64  # chunks whose softmaxes are brought together at a time
TILE = 1024  # weights that are looked at together
LEAST = 16  # queries and bytes of labels: the smallest matrices that tensor cores multiply


@triton.jit
def _in_steps(q_ptr, step_ptr, channel, known):
    """q times the labels' steps, float32 [queries, channels]."""
    q = tl.load(q_ptr + channel[None, :], mask=known, other=0.0)
    return q * tl.load(step_ptr + channel[None, :], mask=known, other=0.0)


@triton.jit
def _query_codes(q_ptr, step_ptr, byte, query, GROUP: tl.constexpr, R: tl.constexpr):
    """Queries in 8 bits a channel: codes of the low and of the high halves of label bytes, and scales [queries]."""
    channel = label_channels(byte)
    known = (query < GROUP)[:, None] & (byte < R // 2)[None, :]
    row = q_ptr + query[:, None] * R
    low = _in_steps(row, step_ptr, channel, known)
    high = _in_steps(row, step_ptr, channel + 4, known)
    top = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)
    some = top > 1e-30
    inverse = tl.where(some, tl.math.div_rn(127.0, tl.where(some, top, 1.0)), 0.0)[:, None]
    scale = tl.where(some, tl.math.div_rn(top, 127.0), 0.0)
    return round_half_even(low * inverse).to(tl.float16), round_half_even(high * inverse).to(tl.float16), scale


@triton.jit(do_not_specialize=["groups", "first"])
def _score_kernel(
    q_ptr,
    labels_ptr,
    step_ptr,
    ends_ptr,
    peaks_ptr,
    sums_ptr,
    groups,
    scale,
    first,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    R: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """peaks[row, head, chunk, query] = highest score, sum; sums[row, head, chunk, query, block] = the blocks' sums.

    Sums of exp(score - highest) over the candidates among the chunk's tokens. Grid (chunks, rows, KV heads).
    """
    chunk, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    begin, end = first * BLOCK, tl.load(ends_ptr + row) * BLOCK
    if (begin >= end) | (chunk * CHUNK >= end) | ((chunk + 1) * CHUNK <= begin):
        return
    candidate = (token >= begin) & (token < end)
    heads = tl.num_programs(2)
    place = row.to(tl.int64) * heads + head
    query, byte = tl.arange(0, QUERIES), tl.arange(0, BYTES)
    low, high, query_scale = _query_codes(q_ptr + place * GROUP * R, step_ptr + head * R, byte, query, GROUP, R)
    at = token // TOKENS * (TOKENS * R // 2) + token % TOKENS * 4
    labels = labels_ptr + head.to(tl.int64) * groups * (TOKENS * R // 2)
    inside = (byte < R // 2)[:, None] & candidate[None, :]
    byte_at = byte // 4 * (TOKENS * 4) + byte % 4
    both = tl.load(labels + byte_at[:, None] + at[None, :], mask=inside, other=0)
    dots = tl.dot(low, (both & 15).to(tl.float16))  # exact: of integers, and below 2^19
    dots = tl.dot(high, (both >> 4).to(tl.float16), acc=dots)
    scores = dots * (scale * query_scale)[:, None]
    scores = tl.where(candidate[None, :], scores, float("-inf"))
    best = tl.max(scores, axis=1)
    sums = tl.sum(tl.exp(scores - best[:, None]).reshape(QUERIES, CHUNK // BLOCK, BLOCK), axis=2)
    known = query < GROUP
    out = (place * tl.num_programs(0) + chunk) * GROUP + query
    tl.store(peaks_ptr + out * 2, best, mask=known)
    tl.store(peaks_ptr + out * 2 + 1, tl.sum(sums, axis=1), mask=known)
    block = tl.arange(0, CHUNK // BLOCK)
    tl.store(sums_ptr + out[:, None] * (CHUNK // BLOCK) + block[None, :], sums, mask=known[:, None])


@triton.jit
def _peaks(peaks_ptr, chunk, scored, query, GROUP: tl.constexpr):
    """Highest scores and sums, [chunks, queries]. Chunks that were not scored weigh nothing."""
    at = peaks_ptr + (chunk[:, None] * GROUP + query[None, :]) * 2
    known = (query < GROUP)[None, :]
    highest = tl.load(at, mask=scored[:, None] & known, other=float("-inf"))
    sums = tl.load(at + 1, mask=scored[:, None] & known, other=0.0)
    return tl.where(known, highest, 0.0), tl.where(known, sums, 1.0)  # no numbers that are none in the padding


@triton.jit(do_not_specialize=["chunks", "first"])
def _weigh_kernel(
    ends_ptr,
    peaks_ptr,
    sums_ptr,
    weights_ptr,
    chunks,
    first,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    PEAKS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """weights[row, head, block] = the block's part of each query's softmax, summed over queries.

    BLOCKS of a chunk, CHUNKS of a program, `chunks` of the labels. Grid (programs, rows, KV heads).
    """
    row, head = tl.program_id(1), tl.program_id(2)
    last, own = tl.load(ends_ptr + row), tl.program_id(0) * CHUNKS
    begin, end = first // BLOCKS, tl.cdiv(last, BLOCKS)  # chunks that were scored
    if (first >= last) | (own >= end) | (own + CHUNKS <= begin):
        return
    place = (row.to(tl.int64) * tl.num_programs(2) + head) * chunks
    query, block = tl.arange(0, GROUP_PADDED), tl.arange(0, BLOCKS)
    best = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PADDED,), tl.float32)
    for tile in range(begin, end, PEAKS):
        chunk = tile + tl.arange(0, PEAKS)
        highest, sums = _peaks(peaks_ptr, place + chunk, chunk < end, query, GROUP)
        higher = tl.maximum(best, tl.max(highest, axis=0))
        total = total * tl.exp(best - higher) + tl.sum(sums * tl.exp(highest - higher[None, :]), axis=0)
        best = higher
    chunk = own + tl.arange(0, CHUNKS)
    scored = (chunk >= begin) & (chunk < end)
    highest, _sums = _peaks(peaks_ptr, place + chunk, scored, query, GROUP)
    factors = tl.exp(highest - best[None, :]) / total[None, :]
    at = ((place + chunk)[:, None] * GROUP + query[None, :])[:, :, None] * BLOCKS + block[None, None, :]
    inside = (scored[:, None] & (query < GROUP)[None, :])[:, :, None]
    weights = tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0) * factors[:, :, None], axis=1)
    tl.store(weights_ptr + (place + chunk)[:, None] * BLOCKS + block[None, :], weights, mask=scored[:, None])


@triton.jit
def _bits(weights_ptr, index, count):
    """Bits of weights, which are in their order as these are not negative, and whether they are there."""
    known = index < count
    return tl.load(weights_ptr + index, mask=known, other=0.0).to(tl.uint32, bitcast=True), known


@triton.jit(do_not_specialize=["blocks", "first", "most"])
def _choose_kernel(weights_ptr, ends_ptr, keep_ptr, chosen_ptr, counts_ptr, blocks, first, most, TILE: tl.constexpr):
    """chosen[row, head] = the heaviest blocks, ascending; counts = how many. Grid (rows, KV heads)."""
    row = tl.program_id(0)
    place = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    candidates = tl.maximum(tl.load(ends_ptr + row) - first, 0)
    keep = tl.minimum(tl.minimum(tl.load(keep_ptr + place), candidates), most)
    weights = weights_ptr + place * blocks + first
    digits = tl.arange(0, 256)
    least = tl.full((), 0, tl.uint32)  # bits of the lightest that is chosen, known from the top
    ties = keep  # chosen of those whose bits begin so
    for shift in tl.static_range(24, -1, -8):
        histogram = tl.zeros((256,), tl.int32)
        for begin in range(0, candidates, TILE):
            bits, known = _bits(weights, begin + tl.arange(0, TILE), candidates)
            if shift < 24:
                known &= (bits >> (shift + 8)) == (least >> (shift + 8))
            histogram += tl.histogram(((bits >> shift) & 255).to(tl.int32), 256, mask=known)
        from_here = tl.cumsum(histogram, axis=0, reverse=True)
        found = tl.maximum(tl.sum((from_here >= ties).to(tl.int32), axis=0) - 1, 0)
        ties -= tl.sum(tl.where(digits == found, from_here - histogram, 0), axis=0)
        least |= found.to(tl.uint32) << shift
    written = tl.zeros((), tl.int32)
    for begin in range(0, candidates, TILE):
        index = begin + tl.arange(0, TILE)
        bits, known = _bits(weights, index, candidates)
        tie = (known & (bits == least)).to(tl.int32)
        taken = (known & (bits > least)) | ((tie > 0) & (tl.cumsum(tie, axis=0) <= ties))
        ties -= tl.sum(tie, axis=0)
        count = taken.to(tl.int32)
        tl.store(chosen_ptr + place * most + written + tl.cumsum(count, axis=0) - 1, first + index, mask=taken)
        written += tl.sum(count, axis=0)
    tl.store(counts_ptr + place, keep)


def select_blocks(
    q: Tensor,
    labels: Tensor,
    step: Tensor,
    scale: float,
    first: int,
    ends: Tensor,
    keep: Tensor,
    block: int,
    chosen: Tensor,
    counts: Tensor,
) -> None:
    """`select` of `flashrt_kernels.ops`: the heaviest blocks of each row and KV head, ascending, into chosen.

    q float32 [T, H, r]; labels uint8 of `flashrt_kernels.labels.label_shape`; step float32 [KVH, r]; scale > 0; block a
    divisor of 16. ends int32 [T], keep int32 [T, KVH], chosen int32 [T, KVH, most] and counts int32 [T, KVH] lie on the
    device, and their values are not checked: ends are within the labels, and no more than `most` are chosen. Raises
    ValueError on anything else. A row's choice depends neither on other rows nor on labels behind its end.
    """
    tokens, heads = _check(q, labels, step, scale, first, ends, keep, block, chosen, counts)
    kv_heads, groups = labels.shape[:2]
    group, channels, most = heads // kv_heads, q.shape[2], chosen.shape[2]
    if tokens == 0:
        return
    chunks, blocks = triton.cdiv(groups * LABEL_TOKENS, CHUNK), CHUNK // block
    place = tokens, kv_heads, chunks
    peaks, sums, weights = (
        torch.empty((*place, *shape), dtype=torch.float32, device=q.device)
        for shape in ((group, 2), (group, blocks), (blocks,))
    )
    _score_kernel[(chunks, tokens, kv_heads)](
        q,
        labels,
        step,
        ends,
        peaks,
        sums,
        groups,
        scale,
        first,
        GROUP=group,
        QUERIES=max(triton.next_power_of_2(group), LEAST),
        R=channels,
        BYTES=max(triton.next_power_of_2(channels // 2), LEAST),
        BLOCK=block,
        TOKENS=LABEL_TOKENS,
        CHUNK=CHUNK,
        enable_fp_fusion=False,
    )
    _weigh_kernel[(triton.cdiv(chunks, CHUNKS), tokens, kv_heads)](
        ends,
        peaks,
        sums,
        weights,
        chunks,
        first,
        GROUP=group,
        GROUP_PADDED=triton.next_power_of_2(group),
        BLOCKS=blocks,
        PEAKS=PEAKS,
        CHUNKS=CHUNKS,
    )
    _choose_kernel[(tokens, kv_heads)](weights, ends, keep, chosen, counts, chunks * blocks, first, most, TILE=TILE)


def _check(
    q: Tensor,
    labels: Tensor,
    step: Tensor,
    scale: float,
    first: int,
    ends: Tensor,
    keep: Tensor,
    block: int,
    chosen: Tensor,
    counts: Tensor,
) -> tuple[int, int]:
    """Rows and heads."""
    device = q.device
    channels = check_labels(labels, step, device)
    check("q", q, torch.float32, (None, None, channels), device)
    tokens, heads, _ = q.shape
    kv_heads, groups = labels.shape[:2]
    if heads == 0 or heads % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, found {heads}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a number above 0, found {scale}")
    if block < 1 or LABEL_TOKENS % block:
        raise ValueError(f"block: expected a divisor of {LABEL_TOKENS}, found {block}")
    if not 0 <= first <= groups * LABEL_TOKENS // block:
        raise ValueError(f"first: expected 0 to {groups * LABEL_TOKENS // block}, found {first}")
    check("ends", ends, torch.int32, (tokens,), device)
    check("keep", keep, torch.int32, (tokens, kv_heads), device)
    check("chosen", chosen, torch.int32, (tokens, kv_heads, None), device)
    check("counts", counts, torch.int32, (tokens, kv_heads), device)
    return tokens, heads
