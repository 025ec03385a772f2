"""Blocks whose codes are numbers of a table: ggml's IQ4_NL, IQ4_XS and MXFP4."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.reference.formats.parts import half, nibbles

UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # values of IQ4 codes
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


def iq4_nl(blocks: Tensor) -> Tensor:
    """float16 d, 16 bytes of codes in the order of Q4_0; d times the code's value."""
    return half(blocks, 0) * _values(UNEVEN, nibbles(blocks[:, 2:]))


def iq4_xs(blocks: Tensor) -> Tensor:
    """float16 d, 2 bytes with the upper two bits of 8 scales s, 4 with the lower four, 128 bytes of codes.

    Groups of 32 have 16 bytes of codes each, in the order of Q4_0. A weight is (d (s - 32)) times its code's value.
    """
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    high = (blocks[:, 2:4, None] >> shifts & 3).reshape(-1, 8)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), 2).reshape(-1, 8)
    scale = half(blocks, 0) * ((low | high << 4).float() - 32)
    values = _values(UNEVEN, nibbles(blocks[:, 8:].reshape(-1, 8, 16)))
    return (scale[:, :, None] * values).reshape(-1, 256)


def mxfp4(blocks: Tensor) -> Tensor:
    """An exponent e, 16 bytes of e2m1 codes in the order of Q4_0; 2^(e - 128) times twice the value."""
    exponent = blocks[:, :1].to(torch.int32)
    bits = torch.where(exponent < 2, 0x200000 << exponent, (exponent - 1).clamp(min=0) << 23)
    return bits.view(torch.float32) * _values(FP4, nibbles(blocks[:, 1:]))


def _values(table: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=codes.device)[codes.long()]
