"""Other ways to choose what a row attends to, in place of labels: as many positions, of the same stores and kernels.

recent      the last ones (Xiao et al., StreamingLLM, arXiv:2309.17453)
bounds      pages of 16 positions, by the largest product that a query can have with a key within the page's least and
            most of each number (Tang et al., Quest, arXiv:2406.10774). In bfloat16 these bounds take 32 bytes a token
            and KV head of 128 numbers, twice what labels take.
keys        blocks by what the softmax over all keys puts on them: what labels stand for. It takes the keys themselves

What each KV head keeps is what labels keep there, and what is attended to in any case is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flashrt.engine.engine import Engine
from flashrt.kv.choice import Choice
from flashrt.kv.index import LabelIndex
from flashrt.kv.sparse import SparseStore

Array = np.ndarray
KeysOf = Callable[[int, int], Array]

PAGE = 16


class Recent:
    """Chooses the last blocks. Stands in for a `LabelIndex`."""

    def __init__(self, index: LabelIndex) -> None:
        self._index, self._choice = index, index._choice

    def begin(self, start: int, keys: KeysOf) -> None:
        """Nothing is kept of keys."""

    def restart(self) -> None:
        """Nothing was."""

    def leaves_out(self, position: int, heads: slice) -> bool:
        return self._index.leaves_out(position, heads)

    def choose(self, query: Array, positions: Sequence[int], heads: slice, chosen: Array, scratch: Array) -> Array:
        counts = np.zeros((len(positions), chosen.shape[1]), np.int32)
        for t, position in enumerate(positions):
            weights = self.weights(query[t], position, heads)
            for h in range(chosen.shape[1]):
                own = heaviest(self._choice, position, h + (heads.start or 0), weights[h])
                chosen[t, h, : len(own)] = own
                counts[t, h] = len(own)
        return counts

    def weights(self, query: Array, position: int, heads: slice) -> Array:
        """Of the blocks that a row at `position` may choose, [kv_heads, blocks]; query: [heads, head_dim]."""
        end = self._choice.end(position)
        return np.broadcast_to(np.arange(end), (len(range(*heads.indices(len(self._choice.shares)))), end))


class Bounds(Recent):
    """Chooses pages by their bounds: the queries of a KV head share what each would put on a page, as with labels."""

    def __init__(self, index: LabelIndex, scale: float) -> None:
        super().__init__(index)
        self._scale, self._least, self._most = scale, np.empty(0), np.empty(0)

    def begin(self, start: int, keys: KeysOf) -> None:
        """Bounds of all whole pages before `start`, those kept that lie there already."""
        known, pages = min(len(self._least), start // PAGE), start // PAGE
        self._least, self._most = self._least[:known], self._most[:known]
        if pages > known:
            new = keys(known * PAGE, pages * PAGE)  # [kv_heads, positions, head_dim]
            paged = new.reshape(len(new), -1, PAGE, new.shape[-1]).swapaxes(0, 1)
            least, most = paged.min(axis=2), paged.max(axis=2)
            self._least = np.concatenate((self._least, least)) if known else least
            self._most = np.concatenate((self._most, most)) if known else most

    def restart(self) -> None:
        self._least, self._most = np.empty(0), np.empty(0)

    def weights(self, query: Array, position: int, heads: slice) -> Array:
        end = self._choice.end(position)
        pages = -(-end * self._choice.block // PAGE)
        least, most = (part[:pages, heads].transpose(1, 2, 0) for part in (self._least, self._most))
        grouped = query.reshape(len(least), -1, query.shape[-1])
        scores = (np.maximum(grouped, 0) @ most + np.minimum(grouped, 0) @ least).astype(np.float64) * self._scale
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares = (scores / scores.sum(axis=-1, keepdims=True)).sum(axis=1)
        return np.repeat(shares, PAGE // self._choice.block, axis=1)[:, :end]


class Keys(Recent):
    """Chooses blocks as labels do, by the keys themselves."""

    def __init__(self, index: LabelIndex, scale: float) -> None:
        super().__init__(index)
        self._scale, self._keys = scale, np.empty((0, 0, 0), np.float32)

    def begin(self, start: int, keys: KeysOf) -> None:
        known = min(self._keys.shape[1], start)
        new = keys(known, start)
        self._keys = np.concatenate((self._keys[:, :known], new), axis=1) if known else new.copy()

    def restart(self) -> None:
        self._keys = np.empty((0, 0, 0), np.float32)

    def weights(self, query: Array, position: int, heads: slice) -> Array:
        block, end = self._choice.block, self._choice.end(position)
        own = self._keys[heads, : end * block]
        scores = query.reshape(len(own), -1, query.shape[-1]) @ own.swapaxes(1, 2) * self._scale
        scores[:, :, :block] = -np.inf  # the first block is no candidate
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares = (scores / scores.sum(axis=-1, keepdims=True)).sum(axis=1)
        return shares.reshape(len(own), end, block).sum(axis=2)


def heaviest(choice: Choice, position: int, head: int, weights: Array) -> Array:
    """The blocks that a row chooses, ascending; of equal ones the earlier."""
    order = np.argsort(-weights[1:], kind="stable") + 1
    return np.sort(order[: choice.kept(position, head)]).astype(np.int32)


def choose_by(engine: Engine, name: str) -> None:
    """From now on choose by 'labels', 'recent', 'bounds' or 'keys' in all layers that choose."""
    for store in choosing(engine):
        own = store.__dict__.setdefault("selectors", {"labels": store._chooser.index})
        if name not in own:
            index: LabelIndex = own["labels"]
            scale = store._attention.scale
            own[name] = {"recent": Recent(index), "bounds": Bounds(index, scale), "keys": Keys(index, scale)}[name]
        store._chooser.index = own[name]


def choosing(engine: Engine) -> Iterator[Any]:
    return (store for store in engine.sequence.kv.stores if isinstance(store, SparseStore))
