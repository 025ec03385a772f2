"""The neurons of one dense feed-forward block that stay in memory while the others stream by: those the text uses.

Which these are decides what a draft is computed with, and not a bit of any result. A pass
sees every neuron, resident or not, so one that turns out to matter changes places with one that does not while it is in
a buffer of the ring: that takes a copy and no read. Neurons move in groups of neighbours, so large that what is not
resident is still read at the disk's full rate: reads of 32 KiB at random places are nearly as fast as any. Pages are
read to where they lie in their block, so that nothing is copied on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flashrt.budget.claims.adaptive import group_rows
from flashrt.cache.streamer import Place
from flashrt.storage.layout import PAGE, Block, TensorLayout
from flashrt.storage.reader import Reader, Ticket

Array = np.ndarray

DECAY = 0.98  # of what was seen of the text, per token
SWAP_MARGIN = 1.25  # by which a group must be of more use than the one whose place it takes
MAX_SWAP_SHARE = 1 / 16  # of the resident groups that may change in a pass of few tokens: each is a copy


class NeuronRun(NamedTuple):
    """Neurons from `first` on that a kernel takes at once: `slots` int32, negative ones in `streamed_bundles`."""

    first: int
    slots: Array
    streamed_bundles: tuple[Array, ...]


class AdaptiveNeurons:
    """Neurons of `tensor` in `memory` (uint8 [rows, stride]), which holds the first of them to begin with.

    `span` blocks are taken at once. `scores` says of what use each neuron was to the text so far: the mean of its
    activation's magnitude, recent tokens weighing more.
    """

    def __init__(self, tensor: TensorLayout, memory: Array, span: int) -> None:
        self.tensor, self.memory, self.span = tensor, memory, span
        self.neurons, self.group = tensor.run_bundles, group_rows(tensor, len(memory))
        self.scores = np.zeros(self.neurons, np.float32)
        groups, held = self.neurons // self.group, len(memory) // self.group
        self._group_bytes, self._memory = self.group * tensor.stride, memory[: held * self.group].reshape(held, -1)
        self._worth = np.zeros(groups, np.float32)  # the sum of a group's scores
        self._place_of = np.empty(groups, np.int32)  # in groups; -1 for one that is not in memory
        self._group_in = np.arange(held, dtype=np.int32)
        self._block_of = np.arange(groups) * self.group // tensor.block_bundles
        blocks = [tensor.block(i) for i in range(tensor.blocks)]
        self._groups = [self._groups_of(block) for block in blocks]
        self._missing = [0] * tensor.blocks  # groups, of each block
        self._spans = {step: [blocks[i : i + step] for i in range(0, len(blocks), step)] for step in (1, span)}
        # Passes for which a block was read, or passed over, that are still to come: what it lacked then is settled.
        self._settled = np.zeros(tensor.blocks, np.int32)
        self._slots = np.empty(self.neurons, np.int32)
        # The groups of a block that the first and the last byte of each of its pages are of; one more is none.
        pages = np.arange(tensor.max_block_bytes // PAGE) * PAGE
        self._block_groups, self._block_pages = tensor.block_bundles // self.group, len(pages)
        self._page_groups = [
            np.minimum(at // self._group_bytes, self._block_groups) for at in (pages, pages + PAGE - 1)
        ]
        self._pages: tuple[Array, list[int]] | None = None  # see `_missing_pages`; None when groups have moved since
        self._moves: dict[int, list[tuple[int, int]]] = {}  # of this pass, by block: groups, and the places they take
        self._moving: tuple[int, int, Array] | None = None  # what `_move_in` is at; meanwhile the index means nothing
        self._drafted: Array | None = None
        self._rebuild()

    @property
    def moves(self) -> int:
        """Groups that may move in during a pass of few tokens."""
        return max(round(MAX_SWAP_SHARE * len(self._group_in)), 1)

    @property
    def resident(self) -> int:
        """Neurons in memory."""
        return len(self._group_in) * self.group

    def blocks(self, wide: bool) -> Iterator[Block]:
        """The blocks that a pass takes from the ring, found out span by span as their turn comes.

        A pass of few tokens takes those that lack something, one of many those that are not in order.
        """
        for span in self.spans(wide):
            self._settled[span[0].index : span[-1].index + 1] += 1
            yield from [block for block in span if not self.in_order(block)] if wide else self.lacking(span)

    def lacking(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of the blocks of which neurons are not resident."""
        return [block for block in blocks if self._missing[block.index]]

    def in_order(self, block: Block) -> bool:
        """Whether a block lies in memory as it does on disk."""
        if self._missing[block.index]:
            return False
        places = self._place_of[self._groups[block.index]]
        return len(places) == 0 or bool((np.diff(places) == 1).all())

    def submit(self, reader: Reader, places: Sequence[Place], ring: Array) -> Iterator[Ticket]:
        """Start to read what is not resident of some blocks, each to where it lies in its block.

        ring: uint8 [buffers, bytes]. A block that was never compared with its checksum is, if it is missing whole.
        """
        unchecked = [self._is_unchecked(reader, block) for block, _ in places]
        rest = [place for place, whole in zip(places, unchecked, strict=True) if not whole]
        ticket = self._submit_missing(reader, rest, ring) if rest else None
        for (block, buffer), whole in zip(places, unchecked, strict=True):
            yield ticket if ticket is not None and not whole else reader.submit(block, ring[buffer, : block.nbytes])

    def spans(self, wide: bool) -> list[list[Block]]:
        """The blocks that are taken at once: one in a pass of many tokens."""
        return self._spans[1 if wide else self.span]

    def gather(self, blocks: Sequence[Block], buffers: dict[int, Array]) -> NeuronRun:
        """What a kernel takes for a span of blocks. `buffers` (uint8 [nbytes]) are of those that lack something."""
        first, last = blocks[0].first, min(blocks[-1].first + blocks[-1].bundles, self.neurons)
        stand_in = self.memory[: self.tensor.block_bundles]  # is not looked at
        used = max(buffers, default=-1)
        streamed_bundles = tuple(
            buffers[block.index].reshape(block.bundles, self.tensor.stride) if block.index in buffers else stand_in
            for block in blocks
            if block.index <= used
        )
        return NeuronRun(first, self._slots[first:last], streamed_bundles)

    def assemble(self, block: Block, buffer: Array) -> Array:
        """A whole block in its order, uint8 [neurons, stride], in the buffer that holds what was not resident of it."""
        places = self._place_of[self._groups[block.index]]
        whole = buffer[: len(places) * self._group_bytes].reshape(len(places), self._group_bytes)
        for i, place in enumerate(places.tolist()):
            if place >= 0:
                whole[i] = self._memory[place]
        return whole.reshape(-1, self.tensor.stride)

    def direct(self, block: Block) -> Array:
        """A whole block that is `in_order`, in memory."""
        places = self._place_of[self._groups[block.index]]
        begin = int(places[0]) * self.group if len(places) else 0
        return self.memory[begin : begin + len(places) * self.group]

    def learn(self, first: int, usage: Array, tokens: int) -> None:
        """Neurons from `first` on had activations whose magnitudes add up to `usage`, over `tokens` tokens."""
        keep = DECAY**tokens
        own = self.scores[first : first + len(usage)]
        own *= keep
        own += (1 - keep) / tokens * usage
        self._worth[first // self.group : (first + len(usage)) // self.group] = own.reshape(-1, self.group).sum(1)
        self._drafted = None

    def choose_all(self) -> None:
        """`choose` from all blocks, for a pass of few tokens: no more groups than it may move."""
        self.choose([block for blocks in self.spans(wide=False) for block in blocks], self.moves)

    def choose(self, blocks: Sequence[Block], most: int | None = None) -> None:
        """Choose which groups of some blocks are to move in as the pass comes by, `most` at most, and whose places.

        By what was learned so far. Where nothing is of more use than what is resident, nothing moves.
        """
        own = slice(self._groups[blocks[0].index].start, self._groups[blocks[-1].index].stop)
        self._moves = {}
        held = self._worth[self._group_in]
        if not len(held):
            return
        # Of what is missing, what is better than the worst that is resident.
        wanted = own.start + ((self._place_of[own] < 0) & (self._worth[own] > SWAP_MARGIN * held.min())).nonzero()[0]
        if not len(wanted):
            return
        wanted = wanted[np.argsort(-self._worth[wanted], kind="stable")][:most]
        places = np.argsort(held, kind="stable")[: len(wanted)]
        better = self._worth[wanted[: len(places)]] > SWAP_MARGIN * held[places]
        for group, place in zip(wanted[: len(places)][better].tolist(), places[better].tolist(), strict=True):
            self._moves.setdefault(int(self._block_of[group]), []).append((group, place))

    def exchange(self, blocks: Sequence[Block], buffers: dict[int, Array]) -> None:
        """The pass is done with some blocks: what was chosen of them moves in, from the buffers that hold it.

        Only groups on which no read under way counts move out.
        """
        self._settled[blocks[0].index : blocks[-1].index + 1] -= 1
        if not self._moves:
            return
        for index, buffer in buffers.items():
            for group, place in self._moves.pop(index, ()):
                if not self._settled[self._block_of[self._group_in[place]]]:
                    self._move_in(group, place, buffer)

    def drafted(self, share: float) -> Array:
        """Slots of the resident neurons of most use, int32 ascending: `share` of all neurons, or all that there are."""
        count = min(round(share * self.neurons), self.resident)
        if self._drafted is None or len(self._drafted) != count:
            scores = self.scores.reshape(-1, self.group)[self._group_in].reshape(-1)
            if 0 < count < len(scores):
                least = np.partition(scores, len(scores) - count)[len(scores) - count]
                self._drafted = (scores >= least).nonzero()[0][:count].astype(np.int32)
            else:
                self._drafted = np.arange(count, dtype=np.int32)
        return self._drafted

    def neurons_in(self, slots: Array) -> Array:
        """The neurons in some slots of the memory."""
        return self._group_in[slots // self.group] * self.group + slots % self.group

    def forget_reads(self) -> None:
        """No read counts any more. The buffers that a pass left half-way held must be as it left them.

        A move that an interrupt has struck is finished from its buffer. If one strikes here too, call it again.
        """
        self._settled[:] = 0
        self._moves = {}
        if self._moving is not None:
            self._fill(*self._moving)
            self._rebuild()
            self._moving = None

    def check_integrity(self) -> None:
        """Assert that the parts of the index agree with each other."""
        held = np.flatnonzero(self._place_of >= 0)
        assert (self._group_in[self._place_of[held]] == held).all(), "the map does not lead to a group's place"
        assert len(held) == len(self._group_in), "a group is in two places, or in none"
        rows = np.repeat(self._place_of, self.group) * self.group + np.tile(np.arange(self.group), len(self._place_of))
        resident = np.repeat(self._place_of >= 0, self.group)
        assert (self._slots[resident] == rows[resident]).all(), "a slot is not where its row is"
        assert (self._slots[~resident] < 0).all(), "a row that is not resident has a slot"
        assert self._missing == [int((self._place_of[own] < 0).sum()) for own in self._groups], "a count is wrong"
        assert (self._settled >= 0).all(), "a block was taken that nobody had asked for"
        assert self._moving is None, "a group is half-way in"

    def _is_unchecked(self, reader: Reader, block: Block) -> bool:
        """Whether a block is missing whole and was never compared with its checksum."""
        own = self._groups[block.index]
        return self._missing[block.index] == own.stop - own.start and not reader.verified(block)

    def _submit_missing(self, reader: Reader, places: Sequence[Place], ring: Array) -> Ticket:
        pages, begins = self._missing_pages()
        parts = [pages[begins[block.index] : begins[block.index + 1]] for block, _ in places]
        in_block, in_buffer = self._block_pages, ring.shape[1] // PAGE
        shifts = [buffer * in_buffer - block.index * in_block for block, buffer in places]
        offsets = np.concatenate(parts, dtype=np.int64) * PAGE + self.tensor.offset
        targets = np.concatenate([part + shift for part, shift in zip(parts, shifts, strict=True)], dtype=np.int64)
        return reader.submit_rows(self.tensor.file, offsets, ring.reshape(-1, PAGE), targets)

    def _missing_pages(self) -> tuple[Array, list[int]]:
        """The pages of the tensor that hold bytes of missing groups, int32, and where each block's begin among them."""
        if self._pages is None:
            blocks, per_block = self.tensor.blocks, self._block_groups
            missing = np.zeros(blocks * per_block, bool)
            missing[: len(self._place_of)] = self._place_of < 0
            before = np.zeros((blocks, per_block + 2), np.int32)  # missing groups before each of a block
            np.cumsum(missing.reshape(blocks, per_block), axis=1, out=before[:, 1:-1])
            before[:, -1] = before[:, -2]
            first, last = self._page_groups
            pages = (before[:, last + 1] > before[:, first]).reshape(-1).nonzero()[0].astype(np.int32)
            self._pages = pages, np.searchsorted(pages, np.arange(blocks + 1) * self._block_pages).tolist()
        return self._pages

    def _groups_of(self, block: Block) -> slice:
        first, end = block.first, min(block.first + block.bundles, self.neurons)
        return slice(first // self.group, max(end, first) // self.group)

    def _move_in(self, group: int, place: int, buffer: Array) -> None:
        """Have a group take the place of another; see `forget_reads` for an interrupt between any two steps."""
        before = int(self._group_in[place])
        self._moving = group, place, buffer
        self._fill(group, place, buffer)
        self._place_of[before], self._place_of[group] = -1, place
        self._missing[self._block_of[group]] -= 1
        self._missing[self._block_of[before]] += 1
        self._pages = None
        self._set_slots(before)
        self._set_slots(group)
        self._moving = None

    def _fill(self, group: int, place: int, buffer: Array) -> None:
        """Copy a group to a place from the buffer of its block."""
        begin = (group - self._groups[self._block_of[group]].start) * self._group_bytes
        self._memory[place] = buffer[begin : begin + self._group_bytes]
        self._group_in[place] = group

    def _rebuild(self) -> None:
        """Derive the index from the groups in their places. Nothing else is relied on."""
        self._place_of[:] = -1
        self._place_of[self._group_in] = np.arange(len(self._group_in))
        self._missing = [int((self._place_of[own] < 0).sum()) for own in self._groups]
        self._pages = None
        for group in range(len(self._place_of)):
            self._set_slots(group)

    def _set_slots(self, group: int) -> None:
        """Where kernels find a group: in memory, or where its block lies among those of its span."""
        first, place = group * self.group, int(self._place_of[group])
        if place >= 0:
            start, step = place * self.group, 1
        else:
            index = int(self._block_of[group])
            start = -1 - (first - index * self.tensor.block_bundles + index % self.span * self.tensor.block_bundles)
            step = -1
        self._slots[first : first + self.group] = start + step * np.arange(self.group)
