"""NVFP4 of compressed-tensors: four bits (E2M1) a weight, a scale in FP8 for 16 of them, and one to divide scales by.

`weight_packed` uint8 [rows, columns / 2], the low half of a byte first; `weight_scale` E4M3 [rows, columns / 16];
`weight_global_scale` [1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.members import Tensors, member, need_matrix, need_shape
from flashrt.storage.sources.quantized.nibbles import split_nibbles
from flashrt.storage.sources.quantized.small_floats import E2M1, scale_numbers
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import StoredTensor

GROUP = 16


@dataclass(frozen=True, slots=True)
class ScaledFours:
    """Weights in NVFP4; `whole` is what scales are divided by, [1, 1]."""

    name: str
    shape: tuple[int, ...]
    codes: StoredTensor
    scales: StoredTensor
    whole: StoredTensor
    members: tuple[StoredTensor, ...]
    label: str = "NVFP4"

    def floats(self, read: Read, region: Region) -> F32:
        start, stop = region.columns
        first = start // 2
        codes = split_nibbles(read(self.codes, region._replace(columns=(first, -(-stop // 2)))))
        weights = E2M1[codes[:, start - 2 * first : stop - 2 * first]]
        groups = np.arange(start, stop) // GROUP
        span = int(groups[0]), int(groups[-1]) + 1
        scales = scale_numbers(self.scales, read(self.scales, region._replace(columns=span)))
        scales /= scale_numbers(self.whole, read(self.whole, Region((0, 1), (0, 1))))
        return np.multiply(weights, scales.take(groups - span[0], 1), out=weights)

    def keeps(self, read: Read | None) -> str | None:
        if read is not None and not scale_numbers(self.whole, read(self.whole, Region((0, 1), (0, 1)))).all():
            raise CheckpointError(f"tensor {self.whole.name} is zero, and scales are divided by it")
        return None

    def blocks(self, read: Read, region: Region) -> Raw:
        raise AssertionError("no format of GGUF holds these weights")


def scaled_fours(tensors: Tensors, module: str, activations: tuple[StoredTensor, ...]) -> ScaledFours:
    """The weights of a module. Raises CheckpointError for tensors that are missing or do not fit."""
    codes, scales = member(tensors, module, "weight_packed", "U8"), member(tensors, module, "weight_scale", "F8_E4M3")
    whole = member(tensors, module, "weight_global_scale", "F32", "BF16", "F16")
    rows, half = need_matrix(codes)
    if 2 * half % GROUP:
        raise CheckpointError(f"tensor {codes.name} has shape {list(codes.shape)}, expected whole groups of {GROUP}")
    need_shape(scales, (rows, 2 * half // GROUP))
    members = codes, scales, whole, *activations
    if whole.shape == ():
        whole = replace(whole, shape=(1,))
    need_shape(whole, (1,))
    return ScaledFours(f"{module}.weight", (rows, 2 * half), codes, scales, replace(whole, shape=(1, 1)), members)
