"""What a sequence is kept in: a store for each of its layers, of a kind chosen by what it takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from flashrt.kv.choice import Choice
from flashrt.spec import Attention, Mixer
from flashrt_kernels.kv import KvCodec

Tensor = Any  # an array of the backend: numpy for 'cpu', torch for 'torch'


class Allocate(Protocol):
    """Gives zeroed memory."""

    def __call__(self, shape: Sequence[int], dtype: type) -> Tensor:
        """Zeros of this shape and numpy type."""


@dataclass(frozen=True, slots=True)
class KvLimits:
    """What a store must hold."""

    context: int  # positions of the sequence
    rows: int  # of one pass that belong to the sequence, drafts behind it included
    choice: Choice | None = None  # how few rows choose the positions that they attend to; None: to all
    held: int | None = None  # pages of older positions of a layer that are kept in memory, others on disk; None: all
    cell_bytes: int = 0  # of a cell of older positions; 0: layers that choose hold all positions
    codec: KvCodec = KvCodec.BF16

    def nbytes(self, attention: Attention, positions: int) -> int:
        """Of keys and values of so many positions of a layer."""
        return positions * attention.kv_bytes(self.codec)


class Kernels(NamedTuple):
    """What attention is computed with."""

    ops: Any
    scratch: Tensor  # uint8, as large as the ops ask for; None where they allocate for themselves
    pages: Callable[..., Any] | None = None  # opens `LayerPages`, of a layer and memory for the first of them


class KvRows(NamedTuple):
    """Where the rows that a sequence has in a pass stand."""

    start: int  # position of the first; a tree's rows without a parent all stand there
    parents: Tensor | None = None  # int32 [T]: makes the rows a tree, as `flashrt_kernels.cpu.attention` takes it
    wide: bool = False  # whether many rows are computed together, by other kernels; few rows may choose what they see
    draft: bool = False  # whether they are guesses, for which nothing is read: older positions may be left out


class LayerStore(ABC):
    """What one layer of one sequence keeps of its tokens.

    Positions are those of the sequence. The store is told where rows stand, and need not know how long the sequence is.
    """

    holds: ClassVar[type[Mixer]]  # what mixes the tokens of the layers that it is for

    @classmethod
    @abstractmethod
    def claim(cls, mixer: Any, limits: KvLimits) -> int | None:
        """Bytes that a store takes of its `allocate`; None for a layer it cannot hold."""

    @classmethod
    def beside(cls, mixer: Any, limits: KvLimits) -> int:
        """Bytes that it takes of its `allocate` beside these."""
        return 0

    @classmethod
    def scratch_bytes(cls, mixer: Any, limits: KvLimits, ops: Any) -> int:
        """Bytes of scratch that it needs beside what attention over all positions does."""
        return 0

    @classmethod
    def far_pages(cls, mixer: Any, limits: KvLimits) -> int:
        """Pages of a segment that it lets go of at the end of the context, to memory or disk."""
        return 0

    @classmethod
    def cells(cls, mixer: Any, limits: KvLimits) -> int:
        """Cells of these pages that a row attends to at the end of the context; 0 where it attends to whole pages."""
        return 0

    @abstractmethod
    def __init__(self, mixer: Any, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        """An empty store, of which `claim` said what it takes."""

    @abstractmethod
    def commit(self, start: int, path: Sequence[int]) -> None:
        """Keep the rows `path`, ascending, of those that came from `start` on: one after the other from there."""

    @abstractmethod
    def restart(self, first: int = 0) -> None:
        """Begin again: nothing is held any more.

        The next rows, or pages, stand from position `first` on, a multiple of a segment; no row sees what lies before.
        """

    @abstractmethod
    def truncate(self, length: int, top: int) -> int:
        """How many of the first `length` tokens can be gone on from: all, or fewer where what they see is gone.

        The sequence has had `top` tokens since it began. The answer depends on lengths alone, never on how large the
        memory is (see `flashrt.kv.reach`), or less where an interrupt has spoilt the memory. Nothing is changed.
        """

    def far(self, start: int, rows: int) -> int:
        """Pages that lie before what is in memory once `rows` rows from position `start` on are appended."""
        return 0

    def cut(self, length: int) -> None:
        """Go on from the first `length` tokens, as `truncate` has allowed. Raises DiskError."""

    def mark(self, position: int) -> None:
        """Note that the sequence will probably be cut back to its first `position` tokens."""

    def close(self) -> None:
        """Give up what is not memory. Closing again does nothing."""


class KvStore(LayerStore):
    """Keys and values of one layer of one sequence. Rows are appended, then attended to, before the next are."""

    holds = Attention
    whole: ClassVar[bool] = False  # whether all heads must be attended to in one call

    @abstractmethod
    def append(self, key: Tensor, value: Tensor | None, start: int) -> None:
        """Write the keys and values of rows, float32 [T, kv_heads, head_dim], from position `start` on.

        value: None where the layer's keys hold it (`Attention.keys_only`)

        What stood there is overwritten: a tree, or drafts behind the sequence.
        """

    @abstractmethod
    def attend(self, query: Tensor, rows: KvRows, heads: slice, out: Tensor, sinks: Tensor | None = None) -> None:
        """Attention of `rows`, whose keys and values were appended, over what they follow, into `out`.

        query: float32 [T, H, head_dim]; out: float32 [T, H * value_width]; heads: the KV heads that these H belong to
        sinks: float32 [H], a score of each beside those of its keys, whose value is zero; None for most models
        """

    @abstractmethod
    def read_page(self, begin: int, heads: slice, out: Tensor) -> None:
        """Copy the positions of one segment, from its first, `begin`, on, of some KV heads.

        out: [heads, n, *pair] of the store's items (see `KvCodec`), on the host; n is a segment, or less at the
            sequence's end
        """

    @abstractmethod
    def write_page(self, begin: int, heads: slice, page: Tensor) -> None:
        """Take back what `read_page` gave: after a `restart`, all heads of a segment, then of the next."""

    @property
    def looks_ahead(self) -> bool:
        """Whether `look_ahead` is of use."""
        return False

    def look_ahead(self, query: Tensor, rows: KvRows, seconds: float) -> None:
        """Start to bring what narrow `rows` (16 at most) will probably attend to.

        query: a guess of their queries, float32 [T, heads, head_dim], which took `seconds` to make
        """
