"""Blocks of 256 weights, whose groups have scales of few bits: ggml's Q4_K, Q5_K and Q6_K."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.reference.formats.parts import half, nibbles, signed


def q4_k(blocks: Tensor) -> Tensor:
    """float16 d, float16 dmin, 12 bytes of 6-bit scales s and offsets m of 8 groups, 128 bytes of codes q.

    Weights 64 j + i and 64 j + 32 + i, i < 32, are the halves of byte 32 j + i. A weight is (d s) q - (dmin m).
    """
    q = nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _scaled(blocks, q.float())


def q5_k(blocks: Tensor) -> Tensor:
    """Q4_K's, with 32 bytes before the codes: bit j of byte i is the fifth bit of weight 32 j + i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts) & 1
    q = nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _scaled(blocks, (q | fifth << 4).float())


def q6_k(blocks: Tensor) -> Tensor:
    """128 bytes with the low four bits of the codes q, 64 with the high two, 16 signed scales s, float16 d.

    Of each 128 weights, weight 64 j + i, i < 64, has half j of byte i, and 32 j + i, i < 32, has bits 2 j of byte i.
    Each 16 weights share a scale. A weight is (d s) (q - 32).
    """
    low = nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 16, 16)
    scale = half(blocks, 208) * signed(blocks[:, 192:208])
    return (scale[:, :, None] * ((low | high << 4).float() - 32)).reshape(-1, 256)


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """Codes [n, 8, 32] with the scales and offsets of their blocks."""
    a, b, c = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), 1).float()
    offsets = torch.cat((b & 63, c >> 4 | b >> 6 << 4), 1).float()
    scale, offset = half(blocks, 0) * scales, half(blocks, 2) * offsets
    return (scale[:, :, None] * q - offset[:, :, None]).reshape(-1, 256)
