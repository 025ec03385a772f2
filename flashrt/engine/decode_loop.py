"""The passes of one generation after its prompt: each gives one token, or with a draft that stands several."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence as Items
from collections.abc import Set

from flashrt.engine.runner import Runner
from flashrt.engine.sequence import Sequence
from flashrt.speculate.acceptance import Step, verify
from flashrt.speculate.drafter import Drafter
from flashrt.speculate.speculator import Speculator
from flashrt.speculate.tree import TokenTree


class DecodeLoop:
    """Continues `tokens`, of which all but the last are in `sequence`. Counts what it does."""

    def __init__(self, runner: Runner, sequence: Sequence, drafters: Items[Drafter], tokens: Items[int]) -> None:
        """`drafters` are those that draft, the cheapest first; none: every pass has one position."""
        self._runner, self._sequence = runner, sequence
        self._speculator = Speculator(drafters, tokens, runner.experience) if drafters else None
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
        return self._speculator.draft(min(self._runner.most_positions(self._sequence), limit))

    def _verify(self, tree: TokenTree, limit: int, ends: Set[int]) -> list[Step]:
        runner, sequence, steps = self._runner, self._sequence, []
        if len(tree) == 1:
            logits = runner.step_batch(sequence, tree.tokens)
        else:
            logits = runner.step_tree(sequence, tree.tokens, tree.parents)
        for step in verify(tree, logits, sequence.sampler):
            steps.append(step)
            if step.token in ends or len(steps) == limit:
                break
        if len(tree) > 1:
            sequence.commit([step.node for step in steps])
        return steps

    def _count(self, tree: TokenTree, steps: Items[Step]) -> None:
        self.count += 1
        self.tokens += len(steps)
        self.positions += len(tree)
        self._drafted.update(range(1, max(tree.depths) + 1))
        self._stood.update(tree.depths[step.node] for step in steps[1:])
