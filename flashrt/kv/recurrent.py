"""The state of a recurrent layer: after a sequence, and after some tokens before, where it can be gone on from.

A state cannot be taken back, so rows of a narrow pass do not move it on: they are kept, and those that became part of
the sequence move it on when the next rows come, in one sweep with these. Rows of a wide pass move it on at once. All
rows are taken one after the other, so states do not depend on how they are cut into passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows, LayerStore, Tensor
from flashrt.kv.marks import MARKS, Marks
from flashrt.kv.reach import LOST
from flashrt.spec import DeltaNet
from flashrt_kernels.limits import NARROW_TOKENS

LIVE = MARKS  # place of the state that moves on
KEPT_ROWS = 2 * NARROW_TOKENS  # those of the last pass that became part of the sequence, and those of the next


class Step(Protocol):
    """Computes the rows of a layer."""

    def __call__(self, rows: Tensor, state: Tensor, out: Tensor, advance: int, parents: Tensor | None = None) -> None:
        """Outputs of the last len(out) rows (float32 [n, row_width], used up); the first `advance` move `state` on.

        parents: of the rows behind these, as in `Ops.delta_rule`
        """


class RecurrentStore(LayerStore):
    """States of a layer, float32 [state_size] each: one that moves on, and one for each mark."""

    holds = DeltaNet

    @classmethod
    def claim(cls, net: DeltaNet, limits: KvLimits) -> int | None:
        return 4 * ((MARKS + 1) * net.state_size + KEPT_ROWS * net.row_width)

    def __init__(self, net: DeltaNet, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        self._states = allocate((MARKS + 1, net.state_size), np.float32)
        self._rows = allocate((KEPT_ROWS, net.row_width), np.float32)
        self._nothing = self._states[:0, : net.width]  # where outputs of no rows go
        self._marks = Marks()
        self._at = 0  # tokens that the state has taken in
        self._taken = 0  # kept rows that became part of the sequence since
        self._step: Step | None = None  # of the last pass, and memory for it to use up
        self._spare: Tensor = None

    @property
    def _end(self) -> int:
        return self._at + self._taken

    def mix(self, inputs: Tensor, rows: KvRows, step: Step, spare: Tensor, out: Tensor) -> None:
        """Outputs of rows into `out` [T, width].

        inputs: float32 [T, row_width], used up; spare: [KEPT_ROWS, row_width], used by `step` until the next call.
        Raises ValueError where rows do not follow what the state has taken in.
        """
        behind, wide = rows.start - self._at, rows.wide or len(inputs) > NARROW_TOKENS
        last = self._taken if wide else self._taken + NARROW_TOKENS - len(inputs)
        if not self._taken <= behind <= last:
            raise ValueError(f"rows from {rows.start} on do not follow a state after {self._end} tokens")
        self._step, self._spare = step, spare
        if wide:
            self._settle(self._taken)
            self._move_on(inputs, out)
            return
        count = behind + len(inputs)
        self._rows[behind:count] = inputs
        spare[:count], taken = self._rows[:count], self._taken
        if taken == 0:
            step(spare[:count], self._states[LIVE], out, 0, rows.parents)
            return
        at, self._at = self._at, LOST
        step(spare[:count], self._states[LIVE], out, taken, rows.parents)
        _down(self._rows, taken, count)
        self._taken, self._at = 0, at + taken

    def commit(self, start: int, path: Sequence[int]) -> None:
        if start + len(path) <= self._at:  # a wide pass has moved the state on
            return
        for place, row in enumerate(path):
            if row != place:
                self._rows[place] = self._rows[row]
        self._taken = len(path)
        while (position := self._marks.next(self._at, self._end)) is not None:
            self._settle(position - self._at)
            self._remember(position)

    def restart(self, first: int = 0) -> None:
        self._at = LOST
        self._marks.restart()
        self._states[LIVE] = 0
        self._taken, self._at = 0, first

    def truncate(self, length: int, top: int) -> int:
        return max((position for position in (*self._marks.held(), self._end) if position <= length), default=0)

    def cut(self, length: int) -> None:
        before, self._at = self._end, LOST
        self._marks.cut(length)
        if length == before:
            self._at = before - self._taken
            return
        self._taken = 0
        if length:
            self._states[LIVE] = self._states[self._marks.places.index(length)]
        self._at = length

    def mark(self, position: int) -> None:
        self._marks.wanted = position
        if position == self._end and position > 0 and position not in self._marks.held():
            self._settle(self._taken)
            self._remember(position)

    def marks(self) -> list[int]:
        """Positions that the sequence can be cut back to, ascending; its end only where it is marked."""
        return self._marks.held()

    def read_state(self, position: int, part: slice, out: Tensor) -> None:
        """Copy some numbers of the state after `position` tokens, which are marked or all, into `out`, on the host."""
        if position == self._end:
            self._settle(self._taken)
            out[...] = self._states[LIVE, part]
        else:
            out[...] = self._states[self._marks.places.index(position), part]

    def write_state(self, position: int, part: slice, values: Tensor) -> None:
        """Take back what `read_state` gave: after a `restart` with the length of the sequence, in ascending order."""
        if position == self._end:
            place = LIVE
        elif position in self._marks.places:
            place = self._marks.places.index(position)
        else:
            place = self._marks.take(position)
            self._marks.places[place] = position
        self._states[place, part] = values

    def restored(self, marks: Sequence[int]) -> None:
        """All states were written; the sequence ends at the last of them, which is among its marks or not."""
        if self._at in marks:
            self._remember(self._at)

    def _move_on(self, inputs: Tensor, out: Tensor) -> None:
        """Take in rows at once, and remember states on the way."""
        assert self._step is not None
        begin, total = 0, len(inputs)
        while begin < total:
            position = self._marks.next(self._at, self._at + total - begin)
            end = total if position is None else begin + position - self._at
            at, self._at = self._at, LOST
            self._step(inputs[begin:end], self._states[LIVE], out[begin:end], end - begin)
            self._at = at + end - begin
            if position is not None:
                self._remember(position)
            begin = end

    def _settle(self, count: int) -> None:
        """Move the state on by the first `count` kept rows of the sequence."""
        if count == 0:
            return
        assert self._step is not None
        self._spare[:count] = self._rows[:count]
        at, self._at = self._at, LOST
        self._step(self._spare[:count], self._states[LIVE], self._nothing, count)
        _down(self._rows, count, self._taken)
        self._taken, self._at = self._taken - count, at + count

    def _remember(self, position: int) -> None:
        place = self._marks.take(position)
        self._states[place] = self._states[LIVE]
        self._marks.places[place] = position


def _down(rows: Tensor, by: int, end: int) -> None:
    """Move the rows behind the first `by`, up to `end`, to the beginning, one by one: they may overlap."""
    for row in range(by, end):
        rows[row - by] = rows[row]
