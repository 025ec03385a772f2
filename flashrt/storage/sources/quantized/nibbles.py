"""Codes of four bits: of Hugging Face's formats neighbours share a byte, of GGUF's blocks weights that lie 16 apart."""

from __future__ import annotations

import numpy as np

from flashrt.storage.sources.decoding import Raw

BLOCK = 32  # weights


def gguf_nibbles(codes: Raw) -> Raw:
    """Blocks uint8 [.., 16] of weights 2k (low) and 2k + 1 (high), as weights k (low) and k + 16 (high)."""
    first, second = codes[..., :8], codes[..., 8:]
    out = np.empty(codes.shape, np.uint8)
    np.bitwise_or(first & 0x0F, second << 4, out=out[..., 0::2])
    np.bitwise_or(first >> 4, second & 0xF0, out=out[..., 1::2])
    return out


def split_nibbles(codes: Raw) -> Raw:
    """Bytes uint8 [rows, n] as codes uint8 [rows, 2 n], the low half of a byte first."""
    out = np.empty((codes.shape[0], 2 * codes.shape[1]), np.uint8)
    np.bitwise_and(codes, 0x0F, out=out[:, 0::2])
    np.right_shift(codes, 4, out=out[:, 1::2])
    return out
