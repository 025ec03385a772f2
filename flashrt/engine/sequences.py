"""How many sequences to hold at a time: the number that ends the work soonest, by measured rates.

More sequences share the bytes that a pass reads, and take memory from the weights (FlexGen, Sheng et al. 2023). So all
numbers that the budget holds are planned, and what a pass takes under each plan is estimated: reading and computing go
on side by side, and reading keeps one of the cores busy that compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashrt.budget.plan import Plan, Workload
from flashrt.config import MOST_SEQUENCES
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.rates import Rates, measure
from flashrt.errors import BudgetError
from flashrt.machine.process import usable_cores

TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, MOST_SEQUENCES)


@dataclass(frozen=True, slots=True)
class Demand:
    """What is to be answered."""

    answers: int
    prompt_tokens: int  # together
    new_tokens: int  # together, at most
    longest: int  # new tokens of the longest answer
    answer_bytes: int = 0  # that an answer takes while it comes, at most


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan comes to."""

    plan: Plan
    read_s: float  # of a pass
    compute_s: float
    tokens_per_s: float

    @property
    def sequences(self) -> int:
        return self.plan.sequences

    def to_json(self) -> dict[str, Any]:
        return {
            "sequences": self.sequences,
            "resident_share": self.resident_share,
            "read_s": self.read_s,
            "compute_s": self.compute_s,
            "tok_per_s": self.tokens_per_s,
        }

    @property
    def resident_share(self) -> float:
        return self.plan.pinned_bytes / self.plan.weight_bytes


@dataclass(frozen=True, slots=True)
class Choice:
    """The best of some estimates, by number of sequences."""

    best: Estimate
    tried: Sequence[Estimate]

    @property
    def why(self) -> str:
        best = self.best
        bound = "reads" if best.read_s > best.compute_s else "computes"
        return (
            f"{best.sequences} sequences of {best.plan.context} tokens, {best.resident_share:.0%} of the weights in "
            f"memory: about {best.tokens_per_s:.1f} tokens/s, where a pass {bound} for "
            f"{max(best.read_s, best.compute_s):.2f} s"
        )


def choose(model: LoadedPack, workload: Workload, demand: Demand, asked: int | None = None) -> Choice:
    """The plan with the most tokens per second; with `asked`, that for so many sequences.

    Raises BudgetError where the budget holds not even one, or not so many.
    """
    most = min(demand.answers, MOST_SEQUENCES)
    numbers = [asked] if asked is not None else sorted({n for n in TRIED if n < most} | {most})
    plans: list[Plan] = []
    for number in numbers:
        try:
            plans.append(model.plan(replace(workload, sequences=number, request_bytes=number * demand.answer_bytes)))
        except BudgetError:
            if not plans:
                raise
            break
    disk = None if all(plan.resident for plan in plans) else model.disk()
    rates, speed = measure(model.pack.layout, model.runtime), math.inf if disk is None else disk.sequential
    tried = [estimate(plan, demand, rates, speed) for plan in plans if plan.far is None or len(plans) == 1]
    return Choice(max(tried, key=lambda each: each.tokens_per_s), tried)


def estimate(plan: Plan, demand: Demand, rates: Rates, bytes_per_s: float) -> Estimate:
    """By Little's law: answers that are `longest` go on as long as there are passes, others take each other's place."""
    passes = max(demand.longest, demand.new_tokens / plan.sequences)
    room = max(plan.prefill_chunk - plan.sequences, 1)
    passes = max(passes, demand.prompt_tokens / room) + 1
    rows, prompts = demand.new_tokens / passes, demand.prompt_tokens / passes
    read = plan.streamed_bytes_per_token / bytes_per_s
    compute = plan.weight_bytes * (rates.narrow(rows) + rates.wide * prompts) + read / usable_cores()
    return Estimate(plan, read, compute, demand.new_tokens / (passes * max(read, compute)))
