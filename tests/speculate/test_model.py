"""A draft model computes what is certain before it is timed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from flashrt.config import Sampling
from flashrt.engine.drafters import CheckpointModel
from flashrt.engine.sampling import Sampler
from flashrt.speculate.model import ModelDrafter


class Runner:
    """Of a small model: says of each pass how many tokens are held then, or which one came."""

    def __init__(self, context: int) -> None:
        self.plan, self.passes = SimpleNamespace(context=context), list[tuple[str, int]]()

    def prefill(self, _: Any, ids: Sequence[int]) -> np.ndarray:
        self.passes.append(("prefill", len(ids)))
        return np.arange(40, dtype=np.float32)

    def step(self, _: Any, token: int) -> np.ndarray:
        self.passes.append(("step", token))
        return np.arange(40, dtype=np.float32)


def smaller(context: int) -> tuple[Runner, ModelDrafter]:
    runner = Runner(context)
    model = CheckpointModel(cast("Any", runner), cast("Any", None))
    return runner, ModelDrafter("checkpoint", model, Sampler(Sampling(), ()))


def test_a_prompt_is_computed_before_the_first_step() -> None:
    runner, drafter = smaller(context=200)
    drafter.accept(range(1, 31))
    assert runner.passes == []
    steps = drafter.propose()
    assert runner.passes == [("prefill", 29)]
    next(steps)
    next(steps)
    assert runner.passes == [("prefill", 29), ("prefill", 30), ("step", 39)]


def test_what_a_pass_brings_is_computed_by_the_first_step() -> None:
    runner, drafter = smaller(context=200)
    drafter.accept(range(1, 31))
    next(drafter.propose())
    runner.passes.clear()
    drafter.accept(range(16))
    steps = drafter.propose()
    assert runner.passes == []
    next(steps)
    assert runner.passes == [("prefill", 46)]


def test_what_came_while_no_draft_was_asked_for_is_computed_before_the_first_step() -> None:
    runner, drafter = smaller(context=200)
    drafter.accept(range(1, 31))
    next(drafter.propose())
    runner.passes.clear()
    for token in range(17):
        drafter.accept([token])
    drafter.propose()
    assert runner.passes == [("prefill", 46)]


def test_a_text_beyond_the_context_is_not_computed() -> None:
    runner, drafter = smaller(context=29)
    drafter.accept(range(1, 31))
    assert list(drafter.propose()) == []
    assert runner.passes == []
