"""Keys and values as they come, and the labels of the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashrt_kernels.gpu.arguments import check
from flashrt_kernels.labels import LABEL_CHANNELS, LABEL_CODES, LABEL_TOKENS
from flashrt_kernels.limits import WIDEST_HEAD

BYTES = 16  # of a label that a program makes at a time


@triton.jit
def round_half_even(x):
    """x to the nearest integer, |x| below 2^22: what is added leaves no bits for a fraction.

    Launched with enable_fp_fusion=False where x is a product: nothing may be added before it is rounded.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def label_channels(byte):
    """The channel of the low four bits of byte `byte` of a token's label; that of the high ones is 4 more."""
    return byte // 4 * 8 + byte % 4


@triton.jit
def _stored(row_ptr, out_ptr, d, DIM: tl.constexpr, HALF: tl.constexpr):
    """Copies a row of DIM numbers into the cache; returns it as it is there.

    bfloat16 is made by hand, halves to even: numpy, behind the interpreter, has none.
    """
    x = tl.load(row_ptr + d, mask=d < DIM, other=0.0)
    if HALF:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000) >> 16
        tl.store(out_ptr.to(tl.pointer_type(tl.uint16)) + d, bits.to(tl.uint16), mask=d < DIM)
        x = (bits << 16).to(tl.float32, bitcast=True)
    else:
        tl.store(out_ptr + d, x, mask=d < DIM)
    return x


@triton.jit
def _codes(key, channel, head, keys_ptr, low_ptr, step_ptr, d, R: tl.constexpr, DIM: tl.constexpr, TOP: tl.constexpr):
    """Codes int32 of the label channels `channel` of a key float32 [D]; those from R on are not read."""
    known = channel < R
    at = head * R + channel
    inside = known[:, None] & (d < DIM)[None, :]
    rows = tl.load(keys_ptr + at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    low = tl.load(low_ptr + at, mask=known, other=0.0)
    step = tl.load(step_ptr + at, mask=known, other=1.0)
    code = tl.math.div_rn(tl.sum(rows * key[None, :], axis=1) - low, step)
    code = tl.where(code > 0.0, tl.minimum(code, TOP), 0.0)  # 0 for what is not a number
    return round_half_even(code).to(tl.int32)


@triton.jit(do_not_specialize=["slot", "slots", "position", "groups"])
def _append_kernel(
    k_ptr,
    v_ptr,
    kv_ptr,
    keys_ptr,
    low_ptr,
    step_ptr,
    labels_ptr,
    slot,
    slots,
    position,
    groups,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    TOP: tl.constexpr,
    BYTES: tl.constexpr,
):
    """kv[head, slot + t] = k[t, head], v[t, head], and the label of that key. Grid (tokens, KV heads)."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DIM_PADDED)
    source = (token * tl.num_programs(1) + head) * DIM
    target = kv_ptr + (head * slots + slot + token) * 2 * DIM
    key = _stored(k_ptr + source, target, d, DIM, HALF)
    _stored(v_ptr + source, target + DIM, d, DIM, HALF)
    place = position + token
    label = labels_ptr + (head * groups + place // TOKENS) * (TOKENS * R // 2) + place % TOKENS * 4
    for first in range(0, R // 2, BYTES):
        byte = first + tl.arange(0, BYTES)
        channel = label_channels(byte)
        low = _codes(key, channel, head, keys_ptr, low_ptr, step_ptr, d, R, DIM, TOP)
        high = _codes(key, channel + 4, head, keys_ptr, low_ptr, step_ptr, d, R, DIM, TOP)
        tl.store(label + byte // 4 * (TOKENS * 4) + byte % 4, (low | high << 4).to(tl.uint8), mask=byte < R // 2)


@dataclass(frozen=True, slots=True)
class KeyLabels:
    """The labels of a layer's keys, and how keys become labels; all on the device.

    The values of a key k are keys[head] @ k; their codes are those of `label_append` (`flashrt_kernels.ops`).
    """

    packed: Tensor  # uint8, `flashrt_kernels.labels.label_shape`
    keys: Tensor  # float32 [KVH, r, D]
    low: Tensor  # float32 [KVH, r]
    step: Tensor  # float32 [KVH, r], more than 0


def kv_append(k: Tensor, v: Tensor, kv: Tensor, slot: int, labels: KeyLabels, position: int) -> None:
    """Writes k and v from `slot` on into the cache, and labels of the keys from `position` on, in one launch.

    k, v float32 [n, KVH, D], n of at least 1, D up to 576; kv bfloat16 or float32 [KVH, slots, 2, D], on the device.
    Labels are those of keys as the cache holds them. Raises ValueError on anything else, or where the room ends.
    """
    device = kv.device
    check("kv", kv, torch.bfloat16 if kv.dtype == torch.bfloat16 else torch.float32, (None, None, 2, None), device)
    heads, slots, _, dim = kv.shape
    if not 1 <= dim <= WIDEST_HEAD:
        raise ValueError(f"kv: expected heads of 1 to {WIDEST_HEAD} numbers, found {dim}")
    check("k", k, torch.float32, (None, heads, dim), device)
    tokens = len(k)
    check("v", v, torch.float32, (tokens, heads, dim), device)
    channels = _check(labels, heads, dim, device)
    groups = labels.packed.shape[1]
    for name, start, room in (("slot", slot, slots), ("position", position, groups * LABEL_TOKENS)):
        if not 0 <= start <= room - tokens:
            raise ValueError(f"{name}: expected 0 to {room - tokens} for {tokens} tokens, found {start}")
    if tokens == 0:
        return
    _append_kernel[(tokens, heads)](
        k,
        v,
        kv,
        labels.keys,
        labels.low,
        labels.step,
        labels.packed,
        slot,
        slots,
        position,
        groups,
        DIM=dim,
        DIM_PADDED=triton.next_power_of_2(dim),
        R=channels,
        HALF=kv.dtype == torch.bfloat16,
        TOKENS=LABEL_TOKENS,
        TOP=LABEL_CODES - 1,
        BYTES=BYTES,
        enable_fp_fusion=False,
    )


def check_labels(packed: Tensor, step: Tensor, device: torch.device) -> int:
    """Raise ValueError unless these are labels and the steps of their channels; returns the number of channels."""
    check("labels", packed, torch.uint8, (None, None, None, LABEL_TOKENS, LABEL_CHANNELS // 2), device)
    channels = packed.shape[2] * LABEL_CHANNELS
    if not LABEL_CHANNELS <= channels <= WIDEST_HEAD:
        raise ValueError(f"labels: expected {LABEL_CHANNELS} to {WIDEST_HEAD} channels, found {channels}")
    check("step", step, torch.float32, (packed.shape[0], channels), device)
    return channels


def _check(labels: KeyLabels, heads: int, dim: int, device: torch.device) -> int:
    """The number of channels."""
    channels = check_labels(labels.packed, labels.step, device)
    if labels.packed.shape[0] != heads:
        raise ValueError(f"labels: expected {heads} KV heads, found {labels.packed.shape[0]}")
    check("keys", labels.keys, torch.float32, (heads, channels, dim), device)
    check("low", labels.low, torch.float32, (heads, channels), device)
    return channels
