"""What drafts for a sequence: the text, a layer that predicts further tokens, a smaller model, and resident neurons."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from flashrt.engine.ahead import AheadModel
from flashrt.engine.runner import Runner
from flashrt.engine.sequence import Sequence
from flashrt.speculate.drafter import Drafter
from flashrt.speculate.lookup import Lookup
from flashrt.speculate.model import ModelDrafter
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


def drafters_of(
    runner: Runner, sequence: Sequence, smaller: tuple[Runner, Sequence] | None, ahead: AheadModel | None = None
) -> list[Drafter]:
    """Those that draft for `sequence`, the cheapest first; none where the plan has no room for drafts.

    smaller: the runner of a smaller model, and its sequence; ahead: the model's layer that predicts further tokens
    """
    if runner.plan.max_draft_tokens == 1:
        return []
    drafters: list[Drafter] = [Lookup(runner.plan.context + 1)]
    if ahead is not None:
        drafters.append(ModelDrafter("ahead", ahead, sequence.sampler))
    if smaller is not None:
        drafters.append(ModelDrafter("checkpoint", CheckpointModel(*smaller), sequence.sampler))
    if runner.plan.drafts:
        drafters.append(ModelDrafter("resident", ResidentModel(runner, sequence), sequence.sampler))
    return drafters


class ResidentModel:
    """The resident neurons of the sequence's own model, as a `DraftModel`."""

    def __init__(self, runner: Runner, sequence: Sequence) -> None:
        self._runner, self._sequence = runner, sequence

    def follow(self, tokens: Items[int]) -> None:
        """The sequence itself is what is certain."""

    def catch_up(self) -> None:
        """It is computed already."""

    def draft(self, token: int, depth: int) -> Array | None:
        """See `DraftModel.draft`."""
        if self._sequence.length + depth >= self._runner.plan.context:
            return None
        return self._runner.draft(self._sequence, token, depth)


class CheckpointModel:
    """A smaller model with a sequence of its own, as a `DraftModel`."""

    def __init__(self, runner: Runner, sequence: Sequence) -> None:
        self._runner, self._sequence = runner, sequence
        self._certain: list[int] = []
        self._behind = 0  # of these, those that came since the last draft

    def follow(self, tokens: Items[int]) -> None:
        """See `DraftModel.follow`."""
        self._certain.extend(tokens)
        self._behind += len(tokens)

    def catch_up(self) -> None:
        """See `DraftModel.catch_up`. What a pass brings, no more than narrow kernels take, is left to `draft`."""
        if self._behind > NARROW_TOKENS and len(self._certain) <= self._runner.plan.context:
            self._runner.prefill(self._sequence, self._certain[:-1])

    def draft(self, token: int, depth: int) -> Array | None:
        """See `DraftModel.draft`."""
        runner, sequence = self._runner, self._sequence
        if len(self._certain) + depth > runner.plan.context:
            return None
        if depth > 0:
            return runner.step(sequence, token)
        self._behind = 0
        return runner.prefill(sequence, self._certain)
