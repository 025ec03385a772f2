"""Kept codecs, decoded: a file for each family, and the table of them all. A new one is added here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashrt_kernels.reference.formats import k_quants, plain, tables
from flashrt_kernels.rows import KEPT, Codec

# Blocks uint8 [n, bytes of a block] → float32 [n, weights of a block], with the operations of ggml in their order.
Decode = Callable[[Tensor], Tensor]

DECODE: dict[Codec, Decode] = {
    Codec.Q4_0: plain.q4_0,
    Codec.Q4_1: plain.q4_1,
    Codec.Q5_0: plain.q5_0,
    Codec.Q5_1: plain.q5_1,
    Codec.Q8_0: plain.q8_0,
    Codec.Q4_K: k_quants.q4_k,
    Codec.Q5_K: k_quants.q5_k,
    Codec.Q6_K: k_quants.q6_k,
    Codec.IQ4_NL: tables.iq4_nl,
    Codec.IQ4_XS: tables.iq4_xs,
    Codec.MXFP4: tables.mxfp4,
}


def decode_kept(rows: Tensor, codec: Codec, k: int) -> Tensor:
    """Rows uint8 [n, >= row_bytes] of a kept codec → float32 [n, k]."""
    block = KEPT[codec]
    blocks = rows[:, : k // block.weights * block.nbytes].reshape(-1, block.nbytes)
    return DECODE[codec](blocks).to(torch.float32).reshape(len(rows), k)
