"""Which positions a row of a decode pass attends to: functions of its own position, whoever shares its pass.

Always the first block, where sinks are (Xiao et al., arXiv:2309.17453), and the last positions up to its own. Of the
blocks between these, the heaviest by their labels (Yang et al., "Post-Training Sparse Attention with Double Sparsity",
arXiv:2408.07092).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from flashrt.labels import KvLabels, LayerLabels
from flashrt_kernels.labels import LABEL_TOKENS
from flashrt_kernels.limits import NARROW_TOKENS

LEAST = 512  # positions that a row chooses at least
RECENT = 2 * NARROW_TOKENS  # positions before and with a row that it attends to, at least


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """How one layer chooses: by `labels`, `block` neighbours together, `shares` of all positions by KV head.

    A row chooses `least` positions at least: fewer save no time that could be noticed, and cost most of the loss.
    """

    labels: LayerLabels
    block: int
    shares: tuple[float, ...]
    least: int = 0

    def most(self, context: int) -> int:
        """Blocks that a row chooses for one KV head, at most."""
        return max((self.kept(context - 1, head) for head in range(len(self.shares))), default=0)

    def kept(self, position: int, head: int) -> int:
        """Blocks that a row at `position` chooses for a KV head; no more than there are."""
        wanted = math.ceil(max(self.share(head) * (position + 1), self.least) / self.block)
        return max(0, min(wanted, self.end(position) - 1))

    def share(self, head: int) -> float:
        """Of all positions, what a KV head chooses."""
        return self.shares[head]

    def end(self, position: int) -> int:
        """Blocks before those that a row at `position` attends to in any case; the first of all is one of them."""
        return recent(position) // self.block


def recent(position: int) -> int:
    """The first of the last positions that a row at `position` attends to."""
    return max(position - RECENT + 1, 0) // LABEL_TOKENS * LABEL_TOKENS


def labelled(start: int) -> int:
    """Positions that have labels once a pass whose first row stands at `start` has begun.

    Drafts may have stood before `start`. All positions that rows of the pass can choose are among these.
    """
    return max(start - NARROW_TOKENS, 0) // LABEL_TOKENS * LABEL_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class SparseKv:
    """Attention of decode passes to a share of all positions: how each layer chooses (None: it does not), at what loss.

    loss: the rise of perplexity that was measured on other text; None: it was not
    """

    keep: float
    loss: float | None
    layers: tuple[Choice | None, ...]

    @classmethod
    def of(cls, labels: KvLabels, keep: float) -> SparseKv:
        """What `labels` choose where this share is kept, and `LEAST` positions at least; 1 keeps all in every head."""
        layers = (
            None
            if layer is None
            else Choice(layer, labels.block, tuple(1.0 if keep >= 1 else share * keep for share in shares), LEAST)
            for layer, shares in zip(labels.layers, labels.shares, strict=True)
        )
        return cls(keep, labels.loss(keep), tuple(layers))

    def digest(self) -> str:
        """Tells this from whatever may choose other positions; 64 hexadecimal digits."""
        found = hashlib.sha256()
        for layer in self.layers:
            found.update(repr(layer and (layer.block, layer.shares, layer.labels.channels)).encode())
            for array in () if layer is None else layer.labels.arrays().values():
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def describe(self) -> str:
        """For people, in one line."""
        share = Fraction(self.keep).limit_denominator(math.ceil(64 / self.keep))  # however small the share is
        loss = "loss not measured" if self.loss is None else f"perplexity {self.loss:+.1%} where measured"
        return f"{share} of the tokens attended to, {loss}"
