"""Weights that are integers of 4 or 8 bits, less a zero point, times a scale for each group of a row's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.quantized.nibbles import BLOCK
from flashrt.storage.sources.quantized.weights import Read, Region
from flashrt.storage.sources.stored import StoredTensor

_KEPT = {4: "Q4_0", 8: "Q8_0"}
_MIDDLE = {4: 8, 8: 128}  # what a block of GGUF takes as the zero point of unsigned codes

Span = tuple[int, int]
Order = NDArray[np.int64]


class Layout(Protocol):
    """How a format stores codes, scales and zero points. Spans are (first, last + 1)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def label(self) -> str: ...
    @property
    def members(self) -> tuple[StoredTensor, ...]: ...
    @property
    def bits(self) -> int: ...
    @property
    def group(self) -> int:
        """Columns that share a scale and a zero point, unless there is an order."""

    @property
    def scales_dtype(self) -> str:
        """What scales are stored as."""

    @property
    def says_symmetric(self) -> bool:
        """Whether the config and the names of tensors let expect zero points in the middle, and columns in order."""

    def check(self, read: Read) -> None:
        """Raises CheckpointError where small tensors contradict the shapes of large ones."""

    def codes(self, read: Read, region: Region) -> Raw:
        """Unsigned codes, uint8 [rows, columns]."""

    def scales(self, read: Read, rows: Span, groups: Span) -> F32:
        """float32 [rows, groups], or [1, 1] for all."""

    def zeros(self, read: Read, rows: Span, groups: Span) -> Raw | None:
        """Zero points of unsigned codes, uint8 [rows, groups] or [1, 1]; None where all are in the middle."""

    def order(self, read: Read) -> Order | None:
        """The group of every column; None where they are in order."""


@dataclass(frozen=True, slots=True)
class IntegerWeights:
    """The weights that a layout means."""

    layout: Layout

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def label(self) -> str:
        return self.layout.label

    @property
    def members(self) -> tuple[StoredTensor, ...]:
        return self.layout.members

    def floats(self, read: Read, region: Region) -> F32:
        layout, (start, stop) = self.layout, region.columns
        weights = layout.codes(read, region).astype(np.float32)
        order = layout.order(read)
        groups = np.arange(start, stop) // layout.group if order is None else order[start:stop]
        span = int(groups.min()), int(groups.max()) + 1
        zeros = layout.zeros(read, region.rows, span)
        weights -= _MIDDLE[layout.bits] if zeros is None else _spread(zeros, groups - span[0])
        with np.errstate(invalid="ignore"):  # scales that are not finite; whoever asks for the weights refuses them
            weights *= _spread(layout.scales(read, region.rows, span), groups - span[0])
        return weights

    def keeps(self, read: Read | None) -> str | None:
        layout, columns = self.layout, self.layout.shape[1]
        fits = columns % BLOCK == 0 == layout.group % BLOCK
        if read is None:
            likely = fits and layout.says_symmetric and layout.scales_dtype != "F32"  # of which float16 holds few
            return _KEPT[layout.bits] if likely else None
        layout.check(read)
        return _KEPT[layout.bits] if fits and self._is_symmetric(read) else None

    def _is_symmetric(self, read: Read) -> bool:
        """Whether columns are in order, zero points in the middle, and scales numbers of float16."""
        layout, (rows, columns) = self.layout, self.layout.shape
        if layout.order(read) is not None:
            return False
        every = (0, rows), (0, -(-columns // layout.group))
        zeros = layout.zeros(read, *every)
        if zeros is not None and (zeros != _MIDDLE[layout.bits]).any():
            return False
        return layout.scales_dtype == "F16" or _fit_half(layout.scales(read, *every))

    def blocks(self, read: Read, region: Region) -> Raw:
        layout, (start, stop) = self.layout, region.columns
        codes = layout.codes(read, region).reshape(-1, (stop - start) // BLOCK, BLOCK)
        span = start // layout.group, -(-stop // layout.group)
        scales = layout.scales(read, region.rows, span).astype("<f2")
        groups = np.arange(start, stop, BLOCK) // layout.group - span[0]
        out = np.empty((*codes.shape[:2], 2 + BLOCK * layout.bits // 8), np.uint8)
        spread = np.broadcast_to(_spread(scales, groups), codes.shape[:2])
        out[..., :2] = np.ascontiguousarray(spread)[..., None].view(np.uint8)
        if layout.bits == 4:
            np.bitwise_or(codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :] << 4, out=out[..., 2:])
        else:
            np.bitwise_xor(codes, 0x80, out=out[..., 2:])
        return out.reshape(len(out), -1)


def by_groups(group: int, columns: int) -> str:
    """What shares a scale, in words."""
    return "by row" if group == columns else f"in groups of {group}"


def _spread(values: NDArray[Any], groups: Order) -> NDArray[Any]:
    """Values [rows, groups of a span] at every column, by its group; those that are one for all columns as they are."""
    return values if values.shape[1] == 1 else values.take(groups, 1)


def _fit_half(scales: F32) -> bool:
    """Whether float16 holds all scales exactly."""
    with np.errstate(over="ignore"):
        return bool((scales.astype(np.float16) == scales).all() and np.isfinite(scales).all())
