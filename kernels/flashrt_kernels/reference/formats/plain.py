"""Blocks of 32 weights with a scale, and some with an offset: ggml's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0."""

from __future__ import annotations

from torch import Tensor

from flashrt_kernels.reference.formats.parts import bits, half, nibbles, signed


def q4_0(blocks: Tensor) -> Tensor:
    """float16 d, 16 bytes of codes q: weight i in the low half of byte i, weight 16 + i in the high one; d (q - 8)."""
    return half(blocks, 0) * (nibbles(blocks[:, 2:]).float() - 8)


def q4_1(blocks: Tensor) -> Tensor:
    """float16 d, float16 m, codes like those of Q4_0; d q + m."""
    return half(blocks, 0) * nibbles(blocks[:, 4:]).float() + half(blocks, 2)


def q5_0(blocks: Tensor) -> Tensor:
    """float16 d, 4 bytes with the fifth bits of the codes q, 16 bytes with the others; d (q - 16)."""
    return half(blocks, 0) * (_five_bits(blocks[:, 2:]) - 16)


def q5_1(blocks: Tensor) -> Tensor:
    """float16 d, float16 m, codes like those of Q5_0; d q + m."""
    return half(blocks, 0) * _five_bits(blocks[:, 4:]) + half(blocks, 2)


def q8_0(blocks: Tensor) -> Tensor:
    """float16 d, 32 signed codes q; d q."""
    return half(blocks, 0) * signed(blocks[:, 2:])


def _five_bits(codes: Tensor) -> Tensor:
    return (nibbles(codes[:, 4:]) | bits(codes[:, :4]) << 4).float()
