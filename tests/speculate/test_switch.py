"""Drafting against not drafting, on a clock of its own: counts of passes and positions, with delays put in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from flashrt.speculate.drafter import Drafter
from flashrt.speculate.speculator import Experience, Speculator
from flashrt.speculate.switch import CHECK, FRESH, TRIAL, Switch
from flashrt.speculate.tree import TokenTree
from tests.speculate.support import Target
from tests.speculate.test_speculator import Clock, NoisyCopy

PROMPT = [1, 0]


@dataclass
class Trace:
    positions: list[int] = field(default_factory=list)
    tokens: int = 0

    def drafted(self, begin: int, end: int | None = None) -> int:
        """Passes with a draft."""
        return sum(n > 1 for n in self.positions[begin:end])


def run(
    drafters: Sequence[Drafter],
    target: Target,
    clock: Clock,
    seconds: Callable[[int, int], float],
    passes: int,
    experience: Experience | None = None,
) -> Trace:
    """`passes` passes, each taking seconds(its number, its positions)."""
    trace, tokens = Trace(), list(PROMPT)
    speculator = Speculator(drafters, PROMPT, experience or Experience(), clock)
    for i in range(passes):
        tree = speculator.draft(12)
        new = followed(target, tree, tokens)
        clock.now += seconds(i, len(tree))
        speculator.learn(new, len(tree), seconds(i, len(tree)))
        tokens += new
        trace.positions.append(len(tree))
        trace.tokens += len(new)
    return trace


def followed(target: Target, tree: TokenTree, tokens: list[int]) -> list[int]:
    """What stands of a tree, and the token after it, greedily."""
    node: int | None = 0
    new: list[int] = []
    while node is not None:
        new.append(int(np.argmax(target.logits([*tokens, *new]))))
        node = tree.child(node, new[-1])
    return new


def drafting(errs: float, step: float = 0.02) -> tuple[Clock, Target, NoisyCopy]:
    clock, target = Clock(), Target(40, 1)
    return clock, target, NoisyCopy(target, errs, clock, step)


@pytest.mark.parametrize("disturbed", [3, 40, 100])
@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_one_slow_pass_changes_next_to_nothing(disturbed: int, factor: float) -> None:
    def seconds(i: int, n: int) -> float:
        return (1 + 0.02 * (n - 1)) * (factor if i == disturbed else 1)

    clock, target, copy = drafting(0.1)
    found = run([copy], target, clock, seconds, 150)
    clock, target, copy = drafting(0.1)
    calm = run([copy], target, clock, lambda i, n: seconds(-1, n), 150)
    assert found.drafted(disturbed + 1, disturbed + 9) >= 8 - CHECK
    assert found.tokens > 0.9 * calm.tokens


def test_a_slow_phase_of_the_machine_does_not_end_drafting() -> None:
    clock, target, copy = drafting(0.1)
    found = run([copy], target, clock, lambda i, n: (1 + 0.02 * (n - 1)) * (3 if 60 <= i < 100 else 1), 200)
    assert found.drafted(60, 100) >= 30
    assert found.drafted(100) >= 90
    assert found.tokens > 3 * 200


def test_a_resident_model_comes_to_off_within_a_few_passes() -> None:
    """Each further position costs a quarter, and four of five drafts are wrong."""
    clock, target, copy = drafting(0.8)
    experience = Experience()
    first = run([copy], target, clock, lambda i, n: 1 + 0.25 * (n - 1), 100, experience)
    assert sum(n - 1 for n in first.positions) <= 40
    second = run([copy], target, clock, lambda i, n: 1 + 0.25 * (n - 1), 100, experience)
    assert sum(n - 1 for n in second.positions) <= 20, "what was learned survives a request"


def test_what_no_estimate_knows_of_turns_drafts_off_too() -> None:
    """Passes after a draft step are slow, of one position as well: no line tells, the outcome does."""
    clock, target, copy = drafting(0.3)
    asked = 0

    def seconds(i: int, n: int) -> float:
        nonlocal asked
        disturbed, asked = copy.steps > asked, copy.steps
        return 5.0 if disturbed else 1.0

    learned: list[float] = []

    def once(i: int, n: int) -> float:  # `run` asks twice of each pass
        if len(learned) == i:
            learned.append(seconds(i, n))
        return learned[i]

    found = run([copy], target, clock, once, 300)
    assert found.tokens / clock.now > 0.8
    assert sum(s > 1 for s in learned[150:]) <= 3 * TRIAL


def test_drafts_that_get_good_are_tried_again() -> None:
    switch = Switch()
    switch.record(False, 1, 1.0)

    def passes(count: int, drafted: tuple[int, float]) -> int:
        """How many of so many passes drafted."""
        tried = 0
        for _ in range(count):
            drafts = switch.drafts()
            tried += drafts
            switch.record(drafts, *(drafted if drafts else (1, 1.0)))
        return tried

    assert passes(400, (1, 2.0)) <= 8 * TRIAL
    assert passes(100, (3, 1.5)) >= 25
    assert passes(300, (3, 1.5)) >= 300 - 6 * CHECK


def test_off_is_measured_again_while_drafts_go_on() -> None:
    switch = Switch()
    switch.record(False, 1, 1.0)
    drafted = []
    for _ in range(300):
        drafted.append(switch.drafts())
        switch.record(drafted[-1], 3 if drafted[-1] else 1, 1.2)
    assert [i for i, drafts in enumerate(drafted) if not drafts] == [
        due + i for due in (12, 79, 146, 213, 280) for i in range(CHECK)
    ]


def test_a_slow_first_pass_does_not_hide_that_drafts_lose() -> None:
    """The only pass without a draft so far took ten times as long; with drafts a token takes twice as long."""
    switch = Switch()
    switch.record(False, 1, 10.0)
    drafted = []
    for _ in range(30):
        drafted.append(switch.drafts())
        switch.record(drafted[-1], *((2, 4.0) if drafted[-1] else (1, 1.0)))
    assert drafted.count(True) <= FRESH[0] + TRIAL


def test_one_slow_draft_is_no_judgement() -> None:
    switch = Switch()
    switch.record(False, 1, 1.0)
    drafted = []
    for i in range(40):
        drafted.append(switch.drafts())
        switch.record(drafted[-1], *((2, 12.0 if i == 20 else 1.2) if drafted[-1] else (1, 1.0)))
    assert drafted.count(False) == CHECK, "a few are measured without; no rest"


@pytest.mark.parametrize("factor", [0.05, 20.0])
@pytest.mark.parametrize("disturbed", range(CHECK))
@pytest.mark.parametrize(("seconds", "pays"), [(1.2, True), (3.2, False)])
def test_one_disturbed_pass_without_a_draft_decides_nothing(
    factor: float, disturbed: int, seconds: float, pays: bool
) -> None:
    """Of a check; two tokens in `seconds` against one in a second."""
    switch = Switch()
    switch.record(False, 1, 1.0 if pays else 10.0)
    drafted = []
    for i in range(30):
        drafted.append(switch.drafts())
        off = factor if i == FRESH[0] + disturbed else 1.0
        switch.record(drafted[-1], *((2, seconds) if drafted[-1] else (1, off)))
    assert (drafted.count(True) == 30 - CHECK) == pays
    assert (drafted.count(True) <= FRESH[0] + TRIAL) == (not pays)


@pytest.mark.parametrize(("off", "drafting"), [(0.5, 0.9), (0.5, 0.7)])
@pytest.mark.parametrize("before", [0, 200])
def test_off_is_found_again_after_a_slow_phase(before: int, off: float, drafting: float) -> None:
    """All passes without a draft were measured while the machine was slow; then drafts lose."""
    switch = Switch()
    for _ in range(12):
        switch.record(False, 1, 2.0)
    for _ in range(before):
        drafts = switch.drafts()
        switch.record(drafts, 1, 1.0 if drafts else 2.0)
    drafted = []
    for _ in range(300):
        drafted.append(switch.drafts())
        switch.record(drafted[-1], 1, drafting if drafted[-1] else off)
    due = max(FRESH) if before else FRESH[0]
    assert drafted[: due + CHECK + TRIAL].count(True) <= due + TRIAL
    assert drafted[due + CHECK + TRIAL :].count(True) <= 5 * TRIAL, "it is left for good, but for trials"
