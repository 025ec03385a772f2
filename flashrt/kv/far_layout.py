"""Where pages of older keys and values lie on disk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flashrt.spec import Attention
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT
from flashrt_kernels.rows import align

DISK_PAGE = 4096  # bytes of which offsets and sizes on disk are multiples
LARGEST_CELL = 12 * DISK_PAGE  # bytes: larger ones would bring far more of what is not chosen than of what is

Array = np.ndarray


class PageId(NamedTuple):
    """A segment of positions of a layer."""

    layer: int
    segment: int


class Place(NamedTuple):
    """Where a page lies in the file, in bytes."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FarLayout:
    """Each layer of `page_bytes` has up to `count` pages of so many bytes, the first `held` of them in memory.

    Layers of `heads` are read by cells, each so many neighbours of one of their KV heads as `cell_bytes` hold.
    `readers` are how many layers attend to those of each, itself included.
    """

    page_bytes: Mapping[int, int]
    held: int
    count: int
    heads: Mapping[int, int] = field(default_factory=dict)  # layer → KV heads
    cell_bytes: int = 0
    readers: Mapping[int, int] = field(default_factory=dict)  # 1 where it says nothing
    _begins: dict[int, int] = field(init=False, repr=False, compare=False)  # bytes before a layer's first page on disk

    def __post_init__(self) -> None:
        layers = sorted(self.page_bytes)
        ends = itertools.accumulate((self.count - self.held) * self.page_bytes[layer] for layer in layers)
        object.__setattr__(self, "_begins", dict(zip(layers, [0, *ends], strict=False)))

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return (self.count - self.held) * sum(self.page_bytes.values())

    @property
    def streamed_bytes(self) -> int:
        """Bytes of pages that a token reads all at the end of the context: those of layers that have no cells."""
        whole = ((layer, nbytes) for layer, nbytes in self.page_bytes.items() if layer not in self.heads)
        streamed = (nbytes * self.readers.get(layer, 1) for layer, nbytes in whole)
        return (self.count - self.held) * sum(streamed)

    @property
    def cells(self) -> int:
        """Cells of a layer over all its KV heads, at most."""
        return max((self.count * (self.page_bytes[layer] // self.cell_bytes) for layer in self.heads), default=0)

    def cells_of_page(self, layer: int) -> int:
        """Cells of each KV head in a page."""
        return self.page_bytes[layer] // (self.heads[layer] * self.cell_bytes)

    def cell_places(self, layer: int, cells: Array) -> tuple[Array, Array]:
        """The segments and the bytes within their pages of cells, int64 [n]: KV head * cells of the context + cell."""
        own = self.cells_of_page(layer)
        head, cell = np.divmod(cells, self.count * own)
        segment, within = np.divmod(cell, own)
        return segment, (head * own + within) * self.cell_bytes

    @property
    def largest(self) -> int:
        """Bytes of the largest page."""
        return max(self.page_bytes.values())

    def place(self, page: PageId) -> Place:
        """A layer's pages lie one after the other."""
        if not self.held <= page.segment < self.count:
            raise IndexError(f"page {page.segment} is none of {self.held} to {self.count - 1}")
        nbytes = self.page_bytes[page.layer]
        return Place(self._begins[page.layer] + (page.segment - self.held) * nbytes, nbytes)


def page_bytes(attention: Attention, codec: KvCodec) -> int:
    """Bytes of a page on disk."""
    return align(ATTENTION_SEGMENT * attention.kv_bytes(codec), DISK_PAGE)


def cell_bytes(attentions: Sequence[Attention], block: int, codec: KvCodec) -> int:
    """Bytes of a cell: the fewest whole disk pages that hold whole blocks of `block` positions of every layer.

    A page holds whole cells. 0 where no number of bytes up to `LARGEST_CELL` does.
    """
    tokens = [attention.kv_bytes(codec) // attention.kv_heads for attention in attentions]
    for blocks in range(1, ATTENTION_SEGMENT // block + 1):
        nbytes = blocks * block * tokens[0]
        if nbytes > LARGEST_CELL:
            return 0
        if nbytes % DISK_PAGE == 0 and all(_divides(nbytes, token, block) for token in tokens):
            return nbytes
    return 0


def _divides(nbytes: int, token: int, block: int) -> bool:
    """Whether so many bytes hold whole blocks of positions of `token` bytes, and a segment holds whole such cells."""
    count = nbytes // token
    return nbytes % (token * block) == 0 and count <= ATTENTION_SEGMENT and ATTENTION_SEGMENT % count == 0
