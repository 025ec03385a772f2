"""Where pages of older keys and values lie on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flashrt.spec import Attention
from flashrt_kernels.limits import ATTENTION_SEGMENT
from flashrt_kernels.rows import align

DISK_PAGE = 4096  # bytes of which offsets and sizes on disk are multiples


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
    """Each layer of `page_bytes` has up to `count` pages of so many bytes, the first `held` of them in memory."""

    page_bytes: Mapping[int, int]
    held: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the file, which a token reads all at the end of the context."""
        return (self.count - self.held) * sum(self.page_bytes.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest page."""
        return max(self.page_bytes.values())

    def place(self, page: PageId) -> Place:
        """A layer's pages lie one after the other."""
        if not self.held <= page.segment < self.count:
            raise IndexError(f"page {page.segment} is none of {self.held} to {self.count - 1}")
        before = sum(nbytes for layer, nbytes in self.page_bytes.items() if layer < page.layer)
        nbytes = self.page_bytes[page.layer]
        return Place((self.count - self.held) * before + (page.segment - self.held) * nbytes, nbytes)


def page_bytes(attention: Attention, item_bytes: int) -> int:
    """Bytes of a page on disk, `item_bytes` each number."""
    return align(2 * attention.kv_heads * ATTENTION_SEGMENT * attention.head_dim * item_bytes, DISK_PAGE)
