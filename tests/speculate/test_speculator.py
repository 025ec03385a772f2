"""The whole loop on a clock of its own: what it yields is plain decoding's, and it is fast where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from flashrt.config import Sampling
from flashrt.engine.sampling import Sampler
from flashrt.speculate.acceptance import verify
from flashrt.speculate.drafter import Candidate, Drafter
from flashrt.speculate.lookup import Lookup
from flashrt.speculate.speculator import Experience, Speculator
from tests.speculate.support import Target, plain

LIMIT = 16
PROMPT = [1, 0]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class NoisyCopy:
    """Drafts greedily with the target itself, but errs for some contexts; each step takes `seconds`."""

    def __init__(self, target: Target, errs: float, clock: Clock, seconds: float) -> None:
        self.name = "copy"
        self.steps = 0
        self._target, self._clock, self._seconds, self.tokens = target, clock, seconds, list[int]()
        self.errs, self._random = errs, np.random.default_rng(0)

    def accept(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens

    def propose(self) -> Iterator[list[Candidate]]:
        path: tuple[int, ...] = ()
        while True:
            self._clock.now += self._seconds
            self.steps += 1
            best, second = np.argsort(-self._target.logits([*self.tokens, *path]))[:2].tolist()
            if self._random.random() < self.errs:
                best = second
            path = (*path, best)
            yield [Candidate(path, 0.9)]


def decode(
    target: Target, drafters: Sequence[Drafter], clock: Clock, passes: Callable[[int], float], count: int
) -> list[int]:
    """`count` tokens or a few more, passes over n positions taking passes(n) seconds."""
    sampler, tokens = Sampler(Sampling(), PROMPT), list(PROMPT)
    speculator = Speculator(drafters, PROMPT, Experience(), clock)
    while len(tokens) < count + len(PROMPT):
        tree = speculator.draft(LIMIT)
        assert tree.tokens[0] == tokens[-1]
        assert len(tree) <= LIMIT
        new = [step.token for step in verify(tree, target.verify(tree, tokens), sampler)]
        clock.now += passes(len(tree))
        speculator.learn(new, len(tree), passes(len(tree)))
        tokens += new
    found = tokens[len(PROMPT) :]
    assert found == plain(target, PROMPT, Sampling(), len(found))
    return found


@pytest.mark.parametrize(("errs", "least"), [(0.0, 4.5), (0.1, 2.5), (0.3, 1.6)])
def test_a_good_draft_makes_it_fast(errs: float, least: float) -> None:
    """Against 1 token per second without a draft; a step takes 0.1 s, and 16 positions 1.3 times as long as one."""
    clock, target = Clock(), Target(40, 1)
    found = decode(target, [NoisyCopy(target, errs, clock, 0.1)], clock, lambda n: 1 + 0.02 * (n - 1), 400)
    assert len(found) / clock.now > least


def best_chain_rate(errs: float, step: float, passes: Callable[[int], float]) -> float:
    rates = [sum((1 - errs) ** i for i in range(n + 1)) / (n * step + passes(n + 1)) for n in range(LIMIT)]
    return max(rates)


@pytest.mark.parametrize("errs", [0.05, 0.2, 0.4])
@pytest.mark.parametrize("step", [0.02, 0.2])
def test_the_rate_is_near_that_of_the_best_fixed_chain(errs: float, step: float) -> None:
    clock, target = Clock(), Target(40, 1)

    def passes(n: int) -> float:
        return 1 + 0.03 * (n - 1)

    found = decode(target, [NoisyCopy(target, errs, clock, step)], clock, passes, 1000)
    assert len(found) / clock.now > 0.9 * best_chain_rate(errs, step, passes)


@pytest.mark.parametrize(("errs", "step", "slope"), [(0.95, 0.2, 0.02), (0.2, 0.9, 0.02), (0.3, 0.01, 1.0)])
def test_where_it_does_not_pay_it_turns_itself_off(errs: float, step: float, slope: float) -> None:
    clock, target = Clock(), Target(40, 1)
    drafter = NoisyCopy(target, errs, clock, step)
    found = decode(target, [drafter], clock, lambda n: 1 + slope * (n - 1), 600)
    assert drafter.steps < 90
    assert len(found) / clock.now > 0.93


def test_it_comes_back_when_the_draft_gets_good() -> None:
    clock, target = Clock(), Target(40, 1)
    drafter = NoisyCopy(target, 0.97, clock, 0.1)

    def passes(n: int) -> float:
        if len(drafter.tokens) > 300:
            drafter.errs = 0.0
        return 1 + 0.02 * (n - 1)

    found = decode(target, [drafter], clock, passes, 1500)
    assert len(found) / clock.now > 2


def test_drafters_combine() -> None:
    """A table of few tokens soon repeats itself, which lookup knows without cost."""
    clock, target = Clock(), Target(6, 2)
    slow, lookup = NoisyCopy(target, 0.5, clock, 0.2), Lookup(2000)
    found = decode(target, [lookup, slow], clock, lambda n: 1 + 0.02 * (n - 1), 400)
    assert len(found) / clock.now > 8
    assert slow.steps < 100


class Dear:
    """A drafter whose first steps, or whose catching up, take long."""

    def __init__(self, drafter: NoisyCopy, clock: Clock, first: Sequence[float] = (), catch_up: float = 0.0) -> None:
        self.name = drafter.name
        self._drafter, self._clock, self._first, self._catch_up = drafter, clock, list(first), catch_up

    def accept(self, tokens: Sequence[int]) -> None:
        self._drafter.accept(tokens)

    def propose(self) -> Iterator[list[Candidate]]:
        self._clock.now += self._catch_up
        self._catch_up = 0.0
        return self._steps()

    def _steps(self) -> Iterator[list[Candidate]]:
        for step in self._drafter.propose():
            if self._first:
                self._clock.now += self._first.pop(0)
            yield step


def test_catching_up_with_a_long_prompt_does_not_end_drafting() -> None:
    clock, target = Clock(), Target(40, 1)
    drafter = NoisyCopy(target, 0.1, clock, 0.05)
    found = decode(target, [Dear(drafter, clock, catch_up=50.0)], clock, lambda n: 1 + 0.02 * (n - 1), 400)
    assert len(found) / (clock.now - 50) > 2


@pytest.mark.parametrize("first", [[20.0], [20.0, 0.0, 20.0]])
def test_disturbed_first_steps_do_not_end_drafting(first: list[float]) -> None:
    clock, target = Clock(), Target(40, 1)
    drafter = NoisyCopy(target, 0.1, clock, 0.05)
    found = decode(target, [Dear(drafter, clock, first)], clock, lambda n: 1 + 0.02 * (n - 1), 1500)
    assert len(found) / clock.now > 2
