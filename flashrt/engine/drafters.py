"""What drafts for an engine: the text itself, a smaller model, and the engine's own resident neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flashrt.engine.sampling import Sampler
from flashrt.speculate.drafter import Drafter
from flashrt.speculate.lookup import Lookup
from flashrt.speculate.model import ModelDrafter

if TYPE_CHECKING:
    from flashrt.engine.engine import Engine

Array = np.ndarray


def drafters_of(engine: Engine, sampler: Sampler) -> list[Drafter]:
    """The cheapest first."""
    drafters: list[Drafter] = [Lookup(engine.plan.context + 1)]
    if engine.drafting is not None:
        drafters.append(ModelDrafter("checkpoint", CheckpointModel(engine.drafting), sampler))
    if engine.plan.drafts:
        drafters.append(ModelDrafter("resident", ResidentModel(engine), sampler))
    return drafters


class ResidentModel:
    """The resident neurons of the engine's own model, as a `DraftModel`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def follow(self, tokens: Sequence[int]) -> None:
        """The engine's own sequence is what is certain."""

    def draft(self, token: int, depth: int) -> Array | None:
        """See `DraftModel.draft`."""
        engine = self._engine
        return engine.draft(token, depth) if engine.length + depth < engine.plan.context else None


class CheckpointModel:
    """An engine of its own, as a `DraftModel`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._certain: list[int] = []

    def follow(self, tokens: Sequence[int]) -> None:
        """See `DraftModel.follow`."""
        self._certain.extend(tokens)

    def draft(self, token: int, depth: int) -> Array | None:
        """See `DraftModel.draft`."""
        if len(self._certain) + depth > self._engine.plan.context:
            return None
        return self._engine.prefill(self._certain) if depth == 0 else self._engine.step(token)
