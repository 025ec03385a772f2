"""MXFP4: four bits (E2M1) a weight and a power of two for 32 of them, which is what MXFP4 of GGUF files is.

gpt-oss has stacks of experts in it: `{matrix}_blocks` uint8 [.., rows, groups, 16] and `{matrix}_scales` uint8
[.., rows, groups]. The matrix [.., rows, columns] is y = W x, and called `{matrix}_blocks` here: plain checkpoints have
it turned around, as transformers has it once it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.members import Tensors, need_dtype, need_shape
from flashrt.storage.sources.quantized.module_names import Exempt
from flashrt.storage.sources.quantized.nibbles import BLOCK, gguf_nibbles
from flashrt.storage.sources.quantized.options import options, strings
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import StoredTensor
from flashrt_kernels.stored import LARGEST_EXPONENT

_READ = ("quant_method", "modules_to_not_convert")
_HARMLESS = ("dequantize",)
_CODES, _SCALES = "_blocks", "_scales"


@dataclass(frozen=True, slots=True)
class MicroscaledFours:
    """`codes` uint8 [.., rows, columns / 2], the low half of a byte first; `scales` uint8 [.., rows, columns / 32]."""

    name: str
    shape: tuple[int, ...]
    codes: StoredTensor
    scales: StoredTensor
    members: tuple[StoredTensor, ...]
    label: str = "MXFP4"

    def keeps(self, read: Read | None) -> str | None:
        return "MXFP4"

    def blocks(self, read: Read, region: Region) -> Raw:
        start, stop = region.columns
        codes = read(self.codes, region._replace(columns=(start // 2, stop // 2)))
        scales = read(self.scales, region._replace(columns=(start // BLOCK, stop // BLOCK)))
        if (scales > LARGEST_EXPONENT).any():
            raise CheckpointError(f"{self.name} holds values that are not finite: the checkpoint is damaged")
        out = np.empty((*scales.shape, 1 + BLOCK // 2), np.uint8)
        out[..., 0] = scales
        out[..., 1:] = gguf_nibbles(codes.reshape(*scales.shape, BLOCK // 2))
        return out.reshape(len(out), -1)

    def floats(self, read: Read, region: Region) -> F32:
        raise AssertionError("all of these weights are kept")


def microscaled_fours(
    name: str, codes: StoredTensor, scales: StoredTensor, members: tuple[StoredTensor, ...]
) -> MicroscaledFours:
    """Weights of `codes` [.., rows, columns / 2]. Raises CheckpointError for shapes and types."""
    need_dtype(codes, "U8")
    need_dtype(scales, "U8", "F8_E8M0")
    *rows, half = codes.shape
    if not rows or half * 2 % BLOCK or not half:
        raise CheckpointError(f"tensor {codes.name} has shape {list(codes.shape)}, expected rows of 16 bytes a block")
    need_shape(scales, (*rows, half * 2 // BLOCK))
    return MicroscaledFours(name, (*rows, 2 * half), codes, scales, members)


def mxfp4_weights(data: Mapping[str, Any], tensors: Tensors) -> Iterator[MicroscaledFours]:
    """Every matrix, or stack of them, in MXFP4. Raises CheckpointError for what is missing or does not fit."""
    exempt = Exempt(strings(options(data, "mxfp4", _READ, _HARMLESS), "modules_to_not_convert"))
    ends = {end: {name.removesuffix(end) for name in tensors if name.endswith(end)} for end in (_CODES, _SCALES)}
    for name in sorted(ends[_CODES] | ends[_SCALES]):
        exempt.refuse(name)
        for end, there in ends.items():
            if name not in there:
                raise CheckpointError(f"{name} is stored in MXFP4, and its tensor {name}{end} is missing")
        codes, scales = tensors[name + _CODES], tensors[name + _SCALES]
        if len(codes.shape) < 3 or codes.shape[-1] != BLOCK // 2:
            raise CheckpointError(f"tensor {codes.name} has shape {list(codes.shape)}, expected [.., rows, groups, 16]")
        flat = replace(codes, shape=(*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))
        yield microscaled_fours(codes.name, flat, scales, (codes, scales))
