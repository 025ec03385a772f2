"""Weights in FP8 (E4M3), each times the scale of the block that it lies in."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.members import need_scales, need_shape
from flashrt.storage.sources.quantized.small_floats import E4M3, scale_numbers
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class ScaledFloats:
    """`scales` are [.., blocks along the rows, blocks along the columns]; a block is cut off where the matrix ends."""

    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    label: str
    members: tuple[StoredTensor, ...]

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def floats(self, read: Read, region: Region) -> F32:
        weights = E4M3[read(self.codes, region)]
        spans = [(a // n, -(-b // n)) for (a, b), n in zip(region[:2], self.block, strict=True)]
        scales = scale_numbers(self.scales, read(self.scales, Region(spans[0], spans[1], region.expert)))
        for axis, ((start, stop), n) in enumerate(zip(region[:2], self.block, strict=True)):
            index = np.arange(start, stop) // n - start // n
            scales = scales if scales.shape[axis] == 1 else scales.take(index, axis)
        return np.multiply(weights, scales, out=weights)

    def keeps(self, read: Read | None) -> str | None:
        return None

    def blocks(self, read: Read, region: Region) -> Raw:
        raise AssertionError("no format of GGUF holds these weights")


def scaled_floats(
    codes: StoredTensor, scales: StoredTensor, block: tuple[int, int] | None, others: tuple[StoredTensor, ...]
) -> ScaledFloats:
    """Weights with a scale for each block, or with None for the whole matrix. Raises CheckpointError for shapes."""
    *stack, rows, columns = codes.shape
    need_scales(scales)
    members = codes, scales, *others
    height, width = block or (max(rows, 1), max(columns, 1))
    grid = (*stack, -(-rows // height), -(-columns // width))
    if scales.shape in ((), (1,)) and grid == (1, 1):
        scales = replace(scales, shape=(1, 1))
    need_shape(scales, grid)
    kind = {None: "by matrix", (1, columns): "by row"}.get(block, f"in blocks of {height}x{width}")
    return ScaledFloats(codes, scales, (height, width), f"FP8 {kind}", members)
