"""AWQ, as AutoAWQ writes it in the order 'gemm': `qweight` [columns, rows / 8] and `qzeros` [groups, rows / 8], whose
words hold eight codes, even rows before odd ones, and `scales` [groups, rows].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.integers import IntegerWeights, Order, Span, by_groups
from flashrt.storage.sources.quantized.members import (
    Tensors,
    member,
    modules_with,
    need_matrix,
    need_shape,
)
from flashrt.storage.sources.quantized.module_names import Exempt
from flashrt.storage.sources.quantized.options import group_size, options, strings
from flashrt.storage.sources.quantized.packed import packed_along_columns
from flashrt.storage.sources.quantized.small_floats import scale_numbers
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor

_READ = (
    "quant_method",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
    "version",
    "format",
    "backend",
    "modules_to_not_convert",
)
_HARMLESS = (  # how weights were quantized, and by which kernels they are to be run; the tensors say what they are
    "zero_point",
    "sym",
    "do_fuse",
    "fuse_max_seq_len",
    "modules_to_fuse",
    "exllama_config",
    "desc_act",
    "damp_percent",
    "true_sequential",
    "act_group_aware",
    "meta",
    "cache_block_outputs",
    "batch_size",
)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word: where the code of row 0, 1, ... of eight lies
_LEAVES = ("qweight", "qzeros", "scales")
_PER_WORD = 8


@dataclass(frozen=True, slots=True)
class AwqLayout:
    """A matrix [rows, columns] of AWQ."""

    name: str
    shape: tuple[int, int]
    group: int
    codes_in: StoredTensor
    zeros_in: StoredTensor
    scales_in: StoredTensor
    bits: int = 4

    @property
    def label(self) -> str:
        return f"AWQ int4 {by_groups(self.group, self.shape[1])}"

    @property
    def members(self) -> tuple[StoredTensor, ...]:
        return self.codes_in, self.zeros_in, self.scales_in

    @property
    def scales_dtype(self) -> str:
        return self.scales_in.dtype

    @property
    def says_symmetric(self) -> bool:
        return False

    def check(self, read: Read) -> None:
        """Nothing here is told twice."""

    def codes(self, read: Read, region: Region) -> Raw:
        turned = Region(region.columns, region.rows)
        return np.ascontiguousarray(packed_along_columns(read, self.codes_in, turned, self.bits, order=_PLACES).T)

    def scales(self, read: Read, rows: Span, groups: Span) -> F32:
        return scale_numbers(self.scales_in, read(self.scales_in, Region(groups, rows))).T

    def zeros(self, read: Read, rows: Span, groups: Span) -> Raw | None:
        return packed_along_columns(read, self.zeros_in, Region(groups, rows), self.bits, order=_PLACES).T

    def order(self, read: Read) -> Order | None:
        return None


def awq_weights(data: Mapping[str, Any], tensors: Tensors) -> Iterator[IntegerWeights]:
    """Every quantized matrix. Raises CheckpointError for tensors that are missing or do not fit."""
    config = options(data, "awq", _READ, _HARMLESS)
    config.refuse("bits", 4)
    config.refuse("w_bit", 4)
    config.refuse("version", "gemm", "GEMM")
    config.refuse("format", "gemm", "GEMM")
    config.refuse("backend", "auto", "autoawq")
    group = group_size(config, "group_size" if "group_size" in data else "q_group_size", 128)
    exempt = Exempt(strings(config, "modules_to_not_convert"))
    for module in dict.fromkeys(module for leaf in _LEAVES for module in modules_with(tensors, leaf)):
        exempt.refuse(module)
        yield IntegerWeights(_layout(tensors, module, group))


def _layout(tensors: Tensors, module: str, group: int | None) -> AwqLayout:
    codes, zeros = member(tensors, module, "qweight", "I32"), member(tensors, module, "qzeros", "I32")
    scales = member(tensors, module, "scales", *PLAIN_CODECS)
    columns, words = need_matrix(codes)
    size, rows = group or columns, words * _PER_WORD
    if columns % size:
        raise CheckpointError(f"tensor {codes.name} has shape {list(codes.shape)}, expected whole groups of {size}")
    need_shape(scales, (columns // size, rows))
    need_shape(zeros, (columns // size, words))
    return AwqLayout(f"{module}.weight", (rows, columns), size, codes, zeros, scales)
