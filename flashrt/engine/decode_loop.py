"""The passes of one generation after its prompt: each gives one token, or with a draft that stands several."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from flashrt.engine.drafters import drafters_of
from flashrt.engine.sampling import Sampler
from flashrt.speculate.acceptance import Step, verify
from flashrt.speculate.speculator import Speculator
from flashrt.speculate.tree import TokenTree

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine


class DecodeLoop:
    """Continues `tokens`, of which all but the last are in the engine's cache. Counts what it does."""

    def __init__(self, engine: Engine, tokens: Sequence[int], sampler: Sampler) -> None:
        self._engine, self._sampler = engine, sampler
        self._speculator = None
        if engine.plan.max_draft_tokens > 1:
            self._speculator = Speculator(drafters_of(engine, sampler), tokens)
        self._last = tokens[-1]
        self.count = 0
        self.tokens = 0  # that they gave
        self.positions = 0  # that they computed
        self.draft_s = self.verify_s = 0.0
        self._drafted: Counter[int] = Counter()  # passes with a draft of this depth
        self._stood: Counter[int] = Counter()  # those in which a token of it stood

    def next(self, limit: int, ends: Set[int]) -> list[int]:
        """The next tokens, `limit` at most, up to one of `ends`; one at least."""
        began = time.perf_counter()
        tree = self._draft(limit)
        drafted = time.perf_counter()
        steps = self._verify(tree, limit, ends)
        verified = time.perf_counter()
        tokens = [step.token for step in steps]
        if self._speculator is not None:
            self._speculator.learn(tokens, len(tree), verified - drafted)
        self._last = tokens[-1]
        self._count(tree, steps)
        self.draft_s += drafted - began
        self.verify_s += verified - drafted
        return tokens

    def acceptance(self) -> list[float]:
        """By depth, from 1 on: of the passes that drafted so far, the share in which a token of that depth stood."""
        return [self._stood[depth] / self._drafted[depth] for depth in range(1, len(self._drafted) + 1)]

    def _draft(self, limit: int) -> TokenTree:
        if self._speculator is None:
            return TokenTree(self._last)
        return self._speculator.draft(min(self._engine.most_positions, limit))

    def _verify(self, tree: TokenTree, limit: int, ends: Set[int]) -> list[Step]:
        engine, steps = self._engine, []
        alone = len(tree) == 1
        logits = engine.step_batch(tree.tokens) if alone else engine.step_tree(tree.tokens, tree.parents)
        for step in verify(tree, logits, self._sampler):
            steps.append(step)
            if step.token in ends or len(steps) == limit:
                break
        if not alone:
            engine.commit([step.node for step in steps])
        return steps

    def _count(self, tree: TokenTree, steps: Sequence[Step]) -> None:
        self.count += 1
        self.tokens += len(steps)
        self.positions += len(tree)
        self._drafted.update(range(1, max(tree.depths) + 1))
        self._stood.update(tree.depths[step.node] for step in steps[1:])
