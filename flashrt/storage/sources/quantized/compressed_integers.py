"""Integers of compressed-tensors: packed into words along rows (`pack-quantized`), or a byte each (`int-quantized`).

`weight_scale` is [rows, groups], or one number for the matrix. Zero points, where there are some, are signed bytes of
the same shape, or words packed along columns. With `weight_g_idx` columns of a group are not neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.integers import IntegerWeights, Order, Span, by_groups
from flashrt.storage.sources.quantized.members import (
    Tensors,
    found,
    member,
    need_dtype,
    need_matrix,
    need_shape,
    read_integers,
)
from flashrt.storage.sources.quantized.packed import packed_along_columns, packed_along_rows, words_of
from flashrt.storage.sources.quantized.schemes import WHAT, Scheme
from flashrt.storage.sources.quantized.small_floats import scale_numbers
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import PLAIN_CODECS, StoredTensor

_SIGN = np.uint8(0x80)  # what tells a signed byte from the unsigned one that is 128 more


@dataclass(frozen=True, slots=True)
class CompressedLayout:
    """A matrix [rows, columns]; codes are words of `bits` each, or signed bytes (`bits` is 8 then)."""

    name: str
    shape: tuple[int, int]
    bits: int
    group: int
    label: str
    codes_in: StoredTensor
    scales_in: StoredTensor
    zeros_in: StoredTensor | None
    order_in: StoredTensor | None
    shape_in: StoredTensor | None
    members: tuple[StoredTensor, ...]

    @property
    def scales_dtype(self) -> str:
        return self.scales_in.dtype

    @property
    def says_symmetric(self) -> bool:
        return self.zeros_in is None and self.order_in is None

    def check(self, read: Read) -> None:
        if self.shape_in is not None:
            says = read_integers(read, self.shape_in)
            if says.tolist() != list(self.shape):
                raise CheckpointError(f"tensor {self.shape_in.name} says {says.tolist()}, expected {list(self.shape)}")
        order, groups = self.order(read), -(-self.shape[1] // self.group)
        if order is not None and np.bincount(order.clip(0, groups), minlength=groups).tolist() != [self.group] * groups:
            assert self.order_in is not None
            raise CheckpointError(f"tensor {self.order_in.name} does not say {groups} groups of {self.group} columns")

    def codes(self, read: Read, region: Region) -> Raw:
        if self.codes_in.dtype == "I8":
            return read(self.codes_in, region) ^ _SIGN
        return packed_along_columns(read, self.codes_in, region, self.bits)

    def scales(self, read: Read, rows: Span, groups: Span) -> F32:
        return scale_numbers(self.scales_in, read(self.scales_in, self._region(self.scales_in, rows, groups)))

    def zeros(self, read: Read, rows: Span, groups: Span) -> Raw | None:
        if self.zeros_in is None:
            return None
        if self.zeros_in.dtype == "I32":
            return packed_along_rows(read, self.zeros_in, Region(rows, groups), self.bits).T
        signed = read(self.zeros_in, self._region(self.zeros_in, rows, groups))
        return signed + np.uint8(1 << (self.bits - 1))

    def order(self, read: Read) -> Order | None:
        if self.order_in is None:
            return None
        order = read_integers(read, self.order_in)
        in_order = (order == -1).any() or np.array_equal(order, np.arange(len(order)) // self.group)
        return None if in_order else order

    @staticmethod
    def _region(tensor: StoredTensor, rows: Span, groups: Span) -> Region:
        """Of one number for all where the tensor has one."""
        return Region((0, 1), (0, 1)) if tensor.shape == (1, 1) else Region(rows, groups)


def packed_integers(
    tensors: Tensors, module: str, scheme: Scheme, activations: tuple[StoredTensor, ...]
) -> IntegerWeights:
    """`pack-quantized` of 4 or 8 bits. Raises CheckpointError for what is missing or does not fit."""
    codes, shape = (
        member(tensors, module, "weight_packed", "I32"),
        member(tensors, module, "weight_shape", "I64", "I32"),
    )
    rows, words = need_matrix(codes)
    if scheme.type != "int" or scheme.bits not in (4, 8):
        raise UnsupportedModelError(f"{WHAT} format {scheme} is not supported ({module})")
    need_shape(shape, (2,))
    scales = member(tensors, module, "weight_scale", *PLAIN_CODECS)
    grouped = scheme.strategy == "group" and scheme.group is not None and len(scales.shape) == 2
    columns = scales.shape[1] * (scheme.group or 1) if grouped else words * 32 // scheme.bits
    need_shape(codes, (rows, words_of(columns, scheme.bits)))
    return _integers(tensors, module, scheme, (codes, scales, shape, *activations), (rows, columns), scheme.bits)


def byte_integers(
    tensors: Tensors, module: str, scheme: Scheme, activations: tuple[StoredTensor, ...]
) -> IntegerWeights:
    """`int-quantized`. Raises CheckpointError for what is missing or does not fit."""
    codes = member(tensors, module, "weight", "I8")
    scales = member(tensors, module, "weight_scale", *PLAIN_CODECS)
    if scheme.type != "int" or scheme.bits > 8:
        raise UnsupportedModelError(f"{WHAT} format {scheme} is not supported ({module})")
    return _integers(tensors, module, scheme, (codes, scales, *activations), need_matrix(codes), 8)


def _integers(
    tensors: Tensors,
    module: str,
    scheme: Scheme,
    members: tuple[StoredTensor, ...],
    shape: tuple[int, int],
    bits: int,
) -> IntegerWeights:
    codes, scales = members[:2]
    rows, columns = shape
    group = scheme.group or columns
    if scheme.strategy not in ("tensor", "channel", "group") or columns % group:
        raise UnsupportedModelError(f"{WHAT} format {scheme} of {columns} columns is not supported ({module})")
    grid = (1, 1) if scheme.strategy == "tensor" else (rows, columns // group)
    zeros, order = _zeros(tensors, module, scheme), _one(tensors, module, "weight_g_idx", "I32", "I64")
    if zeros is not None and zeros.dtype == "I32":
        need_shape(zeros, (words_of(grid[0], bits), grid[1]))
    elif zeros is not None:
        need_shape(zeros := _grid(zeros, grid), grid)
    if order is not None:
        need_shape(order, (columns,))
    need_shape(spread := _grid(scales, grid), grid)
    members += found(tensors, module, "weight_zero_point", "weight_g_idx")
    kind = "by matrix" if scheme.strategy == "tensor" else by_groups(group, columns)
    layout = CompressedLayout(
        f"{module}.weight",
        shape,
        bits,
        group,
        f"int{scheme.bits} {kind}",
        codes,
        spread,
        zeros,
        order,
        _one(tensors, module, "weight_shape"),
        members,
    )
    return IntegerWeights(layout)


def _zeros(tensors: Tensors, module: str, scheme: Scheme) -> StoredTensor | None:
    if scheme.symmetric:
        return _one(tensors, module, "weight_zero_point", "I8", "I32")
    return member(tensors, module, "weight_zero_point", "I8", "I32")


def _one(tensors: Tensors, module: str, leaf: str, *dtypes: str) -> StoredTensor | None:
    for tensor in found(tensors, module, leaf):
        if dtypes:
            need_dtype(tensor, *dtypes)
        return tensor
    return None


def _grid(tensor: StoredTensor, grid: tuple[int, int]) -> StoredTensor:
    """One number for the matrix as [1, 1], whatever shape it is stored in."""
    return replace(tensor, shape=grid) if grid == (1, 1) and tensor.shape in ((), (1,)) else tensor
