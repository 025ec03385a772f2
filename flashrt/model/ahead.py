"""What a layer that predicts further tokens is given: tokens, and the states that the model had before them."""

from __future__ import annotations

import numpy as np

from flashrt.kv.cache import KvCache
from flashrt.model.batch import Batch, Rows
from flashrt.model.decoder import Decoder, Tensor

Array = np.ndarray


class AheadLayer:
    """Passes of the layer in `own`, whose embeddings and head are those of `model`."""

    def __init__(self, own: Decoder, model: Decoder) -> None:
        self.own, self.model = own, model

    def states(self, kv: KvCache, tokens: list[int], before: Array, wide: bool = False, ahead: int = 0) -> Tensor:
        """Normed states of `tokens`, float32 [T, hidden], a view of a buffer; they are written behind the sequence.

        before: states that the model, or this layer, had before each token, normed, float32 [T, hidden]
        """
        batch = Batch([Rows(kv, tokens, ahead=ahead)], wide)
        return self.own.forward(batch, lambda batch, x: self._join(batch, before, x))

    def logits(self, state: Tensor) -> Tensor:
        """Of what follows a state, float32 [1, hidden]: float32 [1, vocab], a view of a buffer of the model's."""
        return self.model.logits(state)

    def _join(self, batch: Batch, before: Array, x: Tensor) -> None:
        work, hidden = self.own.work, self.own.spec.hidden
        pair = work.view("pair", len(batch), 2 * hidden)
        embedded, states = pair[:, :hidden], pair[:, hidden:]
        for begin in range(0, len(batch), self._most):
            part = slice(begin, begin + self._most)
            rows = work.view("y", len(batch.tokens[part]), hidden)
            self.model.look_up(batch.tokens[part], rows)
            work.norm("norm.token", rows, embedded[part])
        work.norm("norm.state", before, states)
        work.linear("join", pair, x, batch.wide)

    @property
    def _most(self) -> int:
        """Tokens whose embeddings the model's buffers take at a time."""
        return self.model.weights.plan.prefill_chunk
