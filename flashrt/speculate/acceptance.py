"""Which drafted tokens stand: those that would have come without a draft.

There is one rule, for greedy decoding and for sampling: each token is chosen from its logits as without a draft, by the
same sampler in the same state, and while the tree has it the walk goes on. So text does not depend on what was
drafted, nor on the measured times by which trees are shaped: the same seed gives the same tokens, with `--speculate
off` too.

Speculative sampling with residuals (Leviathan et al. 2023; Chen et al. 2023; for trees SpecInfer, Miao et al. 2023, and
Sequoia, Chen et al. 2024) keeps the distribution only: a sample would change with every draft. It accepts more
where the target is unsure and the drafter draws at random, nothing more of tokens that are drafted because they are the
likeliest. A drafter here gets part of that back by drawing with a copy of the sequence's sampler, by the same random
numbers (`tools/research/acceptance.py`; Daliri et al. 2024, "Coupling without communication and drafter-invariant
speculative decoding").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from flashrt.speculate.tree import ROOT, TokenTree

Array = np.ndarray


class Chooser(Protocol):
    """A sequence's sampler, told what it chooses by being asked."""

    def choose(self, logits: Array) -> int:
        """The next token. logits: float32 [vocab]; may be changed."""


class Step(NamedTuple):
    """A node that stands, and the token that follows it."""

    node: int
    token: int


def verify(tree: TokenTree, logits: Sequence[Array] | Array, chooser: Chooser) -> Iterator[Step]:
    """The steps that a verified tree is worth: one at least, the root's.

    logits: float32 [nodes, vocab], of what follows each node; may be changed. Only those of nodes that stand are looked
    at. The nodes of the steps are those whose keys and values stay. The token of the last step is not in the tree: it
    is the root of the next one. A token is chosen when its step is asked for, so a sequence that ends earlier draws no
    further.
    """
    node: int | None = ROOT
    while node is not None:
        token = chooser.choose(logits[node])
        yield Step(node, token)
        node = tree.child(node, token)
