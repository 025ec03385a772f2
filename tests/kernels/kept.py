"""Random rows of kept codecs, and what the gguf package makes of them."""

from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from flashrt_kernels.rows import KEPT, Codec, row_bytes


def kept_rows(seed: int, n: int, k: int, codec: Codec, size: float = 0.05) -> NDArray[np.uint8]:
    """Rows uint8 [n, row_bytes] with every code and scale at random; `size` is the root mean square of the weights."""
    random, block = np.random.default_rng(seed), KEPT[codec]
    blocks = random.integers(0, 256, (n * k // block.weights, block.nbytes), np.uint8)
    if codec is Codec.MXFP4:
        blocks[:, 0] = random.integers(118, 124, len(blocks))
    scales = random.standard_normal((len(blocks), len(block.scales)))
    for factor in (1.0, size):
        for i, at in enumerate(block.scales):
            blocks[:, at : at + 2] = (factor * scales[:, i]).astype(np.float16)[:, None].view(np.uint8)
        scales /= np.sqrt(np.mean(as_gguf(blocks, codec).astype(np.float64) ** 2))
    return blocks.reshape(n, row_bytes(codec, k))


def as_gguf(rows: NDArray[np.uint8], codec: Codec) -> NDArray[np.float32]:
    """The weights of rows by the gguf package, float32 [n, k]."""
    return np.asarray(dequantize(rows, GGMLQuantizationType[codec.value.upper()]), np.float32)
