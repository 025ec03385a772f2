"""GPTQ: `qweight` [columns / n, rows], n codes of a word being neighbours of a column, and for every group of columns
`scales` [groups, rows] and `qzeros` [groups, rows / n]. `g_idx` [columns], where it is there, has the group of each.

The first format of the two stores zero points less one. GPTQModel, by which transformers reads them, adds ones to whole
words, so that what one code borrowed from the next comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.integers import IntegerWeights, Order, Span, by_groups
from flashrt.storage.sources.quantized.members import (
    Tensors,
    found,
    member,
    modules_with,
    need_dtype,
    need_matrix,
    need_shape,
    read_integers,
)
from flashrt.storage.sources.quantized.options import group_size, options
from flashrt.storage.sources.quantized.packed import packed_along_columns, packed_along_rows, words_of
from flashrt.storage.sources.quantized.small_floats import scale_numbers
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor

_READ = (
    "quant_method",
    "bits",
    "group_size",
    "format",
    "checkpoint_format",
    "pack_dtype",
    "is_marlin_format",
    "modules_in_block_to_quantize",
)
_HARMLESS = (  # how weights were quantized, and by which kernels they are to be run; the tensors say what they are
    "sym",
    "desc_act",
    "static_groups",
    "true_sequential",
    "act_group_aware",
    "damp_percent",
    "damp_auto_increment",
    "mse",
    "lm_head",
    "dataset",
    "tokenizer",
    "model_name_or_path",
    "model_file_base_name",
    "model_seqlen",
    "max_input_length",
    "block_name_to_quantize",
    "module_name_preceding_first_block",
    "batch_size",
    "pad_token_id",
    "cache_block_outputs",
    "backend",
    "use_cuda_fp16",
    "use_exllama",
    "disable_exllama",
    "exllama_config",
    "hyb_act",
    "quantizer",
    "meta",
)
_BITS = (4, 8)
_LEAVES = ("qweight", "qzeros", "scales")
_ONES = {4: 0x11111111, 8: 0x01010101}


class _Form(NamedTuple):
    """What a config says of all matrices; see `GptqLayout`. `group` is None for a whole row."""

    bits: int
    group: int | None
    zero_add: int
    says_symmetric: bool


@dataclass(frozen=True, slots=True)
class GptqLayout:
    """A matrix [rows, columns] of GPTQ. `zero_add` is added to every word of `qzeros`."""

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    zero_add: int
    says_symmetric: bool
    codes_in: StoredTensor
    zeros_in: StoredTensor
    scales_in: StoredTensor
    order_in: StoredTensor | None
    members: tuple[StoredTensor, ...]

    @property
    def label(self) -> str:
        return f"GPTQ int{self.bits} {by_groups(self.group, self.shape[1])}"

    @property
    def scales_dtype(self) -> str:
        return self.scales_in.dtype

    def check(self, read: Read) -> None:
        if self.order_in is not None:
            groups, order = self.scales_in.shape[0], read_integers(read, self.order_in)
            first, last = order.min(), order.max()
            if (first, last) != (0, groups - 1):
                name = self.order_in.name
                raise CheckpointError(f"tensor {name} says groups {first} to {last}, expected 0 to {groups - 1}")

    def codes(self, read: Read, region: Region) -> Raw:
        return packed_along_rows(read, self.codes_in, Region(region.columns, region.rows), self.bits)

    def scales(self, read: Read, rows: Span, groups: Span) -> F32:
        return scale_numbers(self.scales_in, read(self.scales_in, Region(groups, rows))).T

    def zeros(self, read: Read, rows: Span, groups: Span) -> Raw | None:
        return packed_along_columns(read, self.zeros_in, Region(groups, rows), self.bits, add=self.zero_add).T

    def order(self, read: Read) -> Order | None:
        if self.order_in is None:
            return None
        order = read_integers(read, self.order_in)
        return None if np.array_equal(order, np.arange(len(order)) // self.group) else order


def gptq_weights(data: Mapping[str, Any], tensors: Tensors) -> Iterator[IntegerWeights]:
    """Every quantized matrix. Raises CheckpointError for tensors that are missing or do not fit."""
    config = options(data, "gptq", _READ, _HARMLESS)
    bits, group = config.integer("bits"), group_size(config, default=128)
    config.refuse("bits", *_BITS)
    config.refuse("is_marlin_format", False)
    config.refuse("pack_dtype", "int32")
    form = config.data.get("checkpoint_format") or config.data.get("format") or "gptq"
    config.refuse("checkpoint_format", "gptq", "gptq_v2")
    config.refuse("format", "gptq", "gptq_v2")
    add = _ONES[bits] if form == "gptq" else 0
    one = _Form(bits, group, add, config.flag("sym", True) and not config.flag("desc_act"))
    for module in dict.fromkeys(module for leaf in _LEAVES for module in modules_with(tensors, leaf)):
        yield IntegerWeights(_layout(tensors, module, one))


def _layout(tensors: Tensors, module: str, form: _Form) -> GptqLayout:
    codes, zeros = member(tensors, module, "qweight", "I32"), member(tensors, module, "qzeros", "I32")
    scales, order = member(tensors, module, "scales", *PLAIN_CODECS), next(iter(found(tensors, module, "g_idx")), None)
    words, rows = need_matrix(codes)
    columns = words * 32 // form.bits
    size = form.group or columns
    need_shape(scales, (-(-columns // size), rows))
    need_shape(zeros, (-(-columns // size), words_of(rows, form.bits)))
    if order is not None:
        need_dtype(order, "I32", "I64")
        need_shape(order, (columns,))
    members = codes, zeros, scales, *found(tensors, module, "g_idx")
    return GptqLayout(
        f"{module}.weight",
        (rows, columns),
        form.bits,
        size,
        form.zero_add,
        form.says_symmetric,
        codes,
        zeros,
        scales,
        order,
        members,
    )
