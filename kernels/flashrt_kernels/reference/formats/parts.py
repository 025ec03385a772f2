"""What blocks of kept codecs are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at byte `at` of each block, float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


def nibbles(codes: Tensor) -> Tensor:
    """Bytes [..., m] → the low halves of all of them, then the high ones, [..., 2 m]."""
    return torch.cat((codes & 15, codes >> 4), -1)


def bits(codes: Tensor) -> Tensor:
    """Bytes [n, m] → their bits, lowest first, [n, 8 m]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes[:, :, None] >> shifts) & 1).reshape(len(codes), -1)


def signed(codes: Tensor) -> Tensor:
    """Bytes as signed numbers, float32."""
    return codes.contiguous().view(torch.int8).to(torch.float32)
