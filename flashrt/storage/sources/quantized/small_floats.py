"""Floats of 8 and 4 bits, as tables; the scales of quantized weights, in whatever type a file has them.

E4M3 and E2M1 have a sign, an exponent and a mantissa, E8M0 is 2 ** (byte - 127): see the OCP's specifications of 8-bit
floating point and of microscaling formats (2023).
"""

from __future__ import annotations

import numpy as np

from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor


def _minifloats(exponent_bits: int, mantissa_bits: int, bias: int) -> F32:
    """The number of every code; the exponent 0 has subnormal numbers."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    fraction = (mantissa + (exponent > 0) * (1 << mantissa_bits)) / (1 << mantissa_bits)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    return (sign * np.ldexp(fraction, np.maximum(exponent, 1) - bias)).astype(np.float32)


E2M1 = _minifloats(2, 1, bias=1)
E4M3 = _minifloats(4, 3, bias=7)
E4M3[[0x7F, 0xFF]] = np.nan  # the format has no infinities
_E8M0 = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
_TABLES = {"F8_E4M3": E4M3, "F8_E8M0": _E8M0, "U8": _E8M0}


def scale_numbers(tensor: StoredTensor, raw: Raw) -> F32:
    """Scales of a stored tensor, from uint8 [rows, bytes] to float32 [rows, columns]. Bytes are exponents (E8M0)."""
    if tensor.dtype in _TABLES:
        return _TABLES[tensor.dtype][raw]
    return PLAIN_CODECS[tensor.dtype].decode(np.ascontiguousarray(raw))
