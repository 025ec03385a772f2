"""Drafts by a layer of the model's own that predicts further tokens (multi-token prediction).

It is held whole in memory, and sees each token with the state that the model had before it: as prompts are computed,
and of what each pass has brought, when it is asked for a draft or sixteen tokens wait. Beyond its first token a draft
goes on from the layer's own states. Keys and values are its own; a session does not hold them, so after one the layer
knows what came since.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np

from flashrt.engine.runner import Runner
from flashrt.engine.sequence import Sequence
from flashrt.kv.cache import KvCache
from flashrt.model.ahead import AheadLayer
from flashrt.model.batch import Rows
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray

NOTED = 16  # bytes of a token that the layer has seen: its position, and itself
KEPT_STATES = 4 * NARROW_TOKENS  # of tokens that wait, of a tree, of what waits in one piece, and of last ones


class Due(NamedTuple):
    """A token that the layer has not seen, at a position, with the state before it."""

    position: int
    token: int
    state: Array  # float32 [hidden]


class _Tree(NamedTuple):
    """What a pass over drafted tokens gave: of which only some will stand."""

    rows: Rows
    start: int
    states: Array  # float32 [T, hidden]


class AheadModel:
    """A `DraftModel` for the sequence that `runner` computes."""

    def __init__(self, own: Runner, kv: KvCache, runner: Runner, close: Callable[[], None]) -> None:
        """`own` computes the layer, which keeps what it has seen in `kv`; `close` frees its memory."""
        self._layer, self.close = AheadLayer(own.decoder, runner.decoder), close
        self._device = runner.decoder.device
        self._kv, self._chunk = kv, own.plan.prefill_chunk
        self._positions, self._tokens = array("q"), array("q")  # of what the layer has seen
        self._due: list[Due] = []
        self._last: tuple[int, Array] | None = None  # the position of the last state of the model's, and the state
        self._tree: _Tree | None = None
        self._state = np.zeros(0, np.float32)  # of the layer, behind the last token

    def saw(self, sequence: Sequence, rows: Rows, states: Array) -> None:
        """A pass has computed `rows`, which are not yet part of the sequence; states: float32 [T, hidden]."""
        states, start = self._device.get(states), rows.start
        if rows.parents is not None:
            self._tree = _Tree(rows, start, states.copy())
            return
        self._tree = None
        self._settle(sequence, start)
        before = None if self._last is None or self._last[0] != start - 1 else self._last[1]
        seen = self._seen
        fresh = [j for j in range(len(rows.tokens)) if start + j > seen and (j > 0 or before is not None)]
        if len(fresh) > NARROW_TOKENS:
            self._absorb()
            self._compute_all(start, rows.tokens, states, before, fresh[0])
        else:
            own = [states[j - 1] if j else before for j in fresh]
            self._wait([Due(start + j, rows.tokens[j], np.array(state)) for j, state in zip(fresh, own, strict=True)])
        self._last = start + len(rows.tokens) - 1, states[-1].copy()

    def follow(self, tokens: Items[int]) -> None:
        """See `DraftModel.follow`."""
        tree, self._tree = self._tree, None
        if tree is None:
            if self._last is not None and self._last[0] + 1 > self._seen:
                self._wait([Due(self._last[0] + 1, tokens[-1], self._last[1])])
            return
        node: int | None = 0
        for position, token in enumerate(tokens, tree.start + 1):
            assert node is not None
            self._last = position - 1, tree.states[node]
            if position > self._seen:
                self._wait([Due(position, token, tree.states[node])])
            node = _child(tree.rows, node, token)

    def catch_up(self) -> None:
        """See `DraftModel.catch_up`: what waits is left to `draft`."""

    def draft(self, token: int, depth: int) -> Array | None:
        """See `DraftModel.draft`."""
        if depth == 0:
            self._absorb()
        if not self._tokens or self._kv.length + depth > self._kv.capacity:
            return None
        if depth > 0:
            self._state = self._device.get(self._layer.states(self._kv, [token], self._state[None], ahead=depth - 1))[
                -1
            ].copy()
        return self._device.get(self._layer.logits(self._state[None]))[0]

    @property
    def _seen(self) -> int:
        """The last position of which the layer has seen the token, or will."""
        return self._due[-1].position if self._due else self._positions[-1] if self._positions else -1

    def _settle(self, sequence: Sequence, start: int) -> None:
        """Forget what is no part of a sequence that goes on at position `start`."""
        if self._last is not None and self._last[0] == start - 1 and self._seen <= start:
            return
        self._due = []
        if self._last is not None and self._last[0] != start - 1:
            self._last = None
        held, seen = sequence.tokens, zip(self._positions, self._tokens, strict=True)
        same = itertools.takewhile(lambda own: own[0] < start and held[own[0]] == own[1], seen)
        kept = sum(1 for _ in same)
        self._kv.truncate(kept)
        del self._positions[kept:], self._tokens[kept:]

    def _wait(self, due: Items[Due]) -> None:
        """Have the layer see tokens later."""
        if len(self._due) + len(due) > NARROW_TOKENS:
            self._absorb()
        self._due.extend(due)

    def _absorb(self) -> None:
        """Have the layer see what waits."""
        due, self._due = self._due, []
        if due:
            states = np.stack([own.state for own in due])
            self._compute([own.position for own in due], [own.token for own in due], states, wide=False)

    def _compute_all(self, start: int, tokens: Items[int], states: Array, before: Array | None, first: int) -> None:
        """Have the layer see the tokens of a pass from the one at `first` on."""
        for begin in range(first, len(tokens), self._chunk):
            end = min(begin + self._chunk, len(tokens))
            own = states[max(begin - 1, 0) : end - 1]
            if begin == 0:
                own = np.concatenate([np.asarray(before)[None], own])
            self._compute(list(range(start + begin, start + end)), list(tokens[begin:end]), own, wide=True)

    def _compute(self, positions: list[int], tokens: list[int], before: Array, wide: bool) -> None:
        found = self._layer.states(self._kv, tokens, before, wide)
        self._state = self._device.get(found[-1:])[0].copy()
        self._kv.append(len(tokens))
        self._positions.extend(positions)
        self._tokens.extend(tokens)


def _child(rows: Rows, node: int, token: int) -> int | None:
    """The row of a tree that follows `node` with `token`."""
    parents = rows.parents or ()
    found = (i for i, parent in enumerate(parents) if parent == node and rows.tokens[i] == token)
    return next(found, None)
