"""What stands is what would have come anyway: token by token, and in its distribution."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.config import Sampling
from flashrt.engine.sampling import Sampler
from flashrt.speculate.acceptance import verify
from flashrt.speculate.tree import ROOT, TokenTree
from tests.distribution import distribution
from tests.speculate.support import Target, path_to, plain, planters, speculative

SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3),
    Sampling(temperature=0.8, seed=3),
    Sampling(temperature=1.5, top_k=4, top_p=0.9, min_p=0.05, repetition_penalty=1.7, seed=4),
]
DRAFTS = list(planters(Target(2, 0), 0))
PROMPT = [1, 0, 3]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_tokens_are_those_of_plain_decoding(sampling: Sampling, draft: str) -> None:
    for seed in range(4):
        target = Target(7, seed)
        found = speculative(target, PROMPT, sampling, 90, planters(target, seed)[draft])
        assert found == plain(target, PROMPT, sampling, len(found))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 9), st.sampled_from(SAMPLINGS))
def test_any_trees(seed: int, vocab: int, sampling: Sampling) -> None:
    target = Target(vocab, seed)
    found = speculative(target, [0, vocab - 1], sampling, 20, planters(target, seed)["anything"])
    assert found == plain(target, [0, vocab - 1], sampling, len(found))


def test_a_perfect_draft_stands_as_a_whole() -> None:
    target = Target(7, 5)
    tokens, tree, node = list(PROMPT), TokenTree(PROMPT[-1]), ROOT
    for token in plain(target, PROMPT, Sampling(), 6):
        tree.add(ROOT, (token + 1) % 7)  # beside it something wrong
        node = tree.add(node, token)
    steps = list(verify(tree, target.verify(tree, tokens), Sampler(Sampling(), PROMPT)))
    assert [step.node for step in steps] == path_to(tree, node)
    assert [step.token for step in steps] == plain(target, PROMPT, Sampling(), 7)


def test_a_copy_of_the_sampler_drafts_what_is_sampled() -> None:
    target, sampler = Target(7, 6), Sampler(SAMPLINGS[3], PROMPT)
    drafter, tokens, tree, node = copy.deepcopy(sampler), list(PROMPT), TokenTree(PROMPT[-1]), ROOT
    for _ in range(9):
        tokens.append(drafter.choose(target.logits(tokens)))
        node = tree.add(node, tokens[-1])
    steps = list(verify(tree, target.verify(tree, PROMPT), sampler))
    assert [step.token for step in steps[:-1]] == tokens[len(PROMPT) :]


def test_nothing_is_drawn_beyond_the_last_step_asked_for() -> None:
    target = Target(7, 6)
    tree = TokenTree(PROMPT[-1])
    planters(target, 0)["everything"](tree, PROMPT)
    sampler, other = (Sampler(SAMPLINGS[3], PROMPT) for _ in range(2))
    next(verify(tree, target.verify(tree, PROMPT), sampler))
    other.choose(target.logits(PROMPT))
    logits = np.random.default_rng(0).normal(size=7).astype(np.float32)
    assert sampler.choose(logits.copy()) == other.choose(logits.copy())


def pair_probabilities(target: Target, prompt: list[int], sampling: Sampling) -> dict[tuple[int, int], float]:
    def following(tokens: list[int]) -> dict[int, float]:
        tokens_, probabilities = distribution(target.logits(tokens), sampling)
        return dict(zip(tokens_.tolist(), probabilities.tolist(), strict=True))

    return {
        (first, second): p * q
        for first, p in following(prompt).items()
        for second, q in following([*prompt, first]).items()
    }


def excess(counts: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> float:
    """Pearson's chi-square, in standard deviations above what chance makes of it."""
    assert counts.keys() <= expected.keys(), "what cannot be drawn was drawn"
    runs, likely = counts.total(), {pair: p for pair, p in expected.items() if p * counts.total() >= 5}
    rare = (runs - sum(counts[pair] for pair in likely), runs * (1 - sum(likely.values())))
    cells = [(counts[pair], p * runs) for pair, p in likely.items()] + ([rare] if rare[1] >= 5 else [])
    freedom = len(cells) - 1
    return (sum((seen - mean) ** 2 / mean for seen, mean in cells) - freedom) / math.sqrt(2 * freedom)


RUNS = 3000


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("options", [{}, {"top_k": 4}])
def test_pairs_have_the_distribution_of_the_target(options: dict[str, int], draft: str) -> None:
    target, prompt = Target(5, 8, spread=1.0), [2, 4]
    plant, counts = planters(target, 0)[draft], Counter()
    for seed in range(RUNS):
        sampling = Sampling(temperature=0.9, seed=seed, **options)  # type: ignore[arg-type]
        counts[tuple(speculative(target, prompt, sampling, 2, plant)[:2])] += 1
    assert excess(counts, pair_probabilities(target, prompt, sampling)) < 3.5


def test_the_test_of_the_distribution_can_fail() -> None:
    """A rule that takes the likeliest pair a little too often is found out."""
    target, prompt, sampling = Target(5, 8, spread=1.0), [2, 4], Sampling(temperature=0.9)
    expected, random = pair_probabilities(target, prompt, sampling), np.random.default_rng(0)
    pairs, probabilities = zip(*expected.items(), strict=True)
    drawn = [pairs[i] for i in random.choice(len(pairs), RUNS, p=probabilities)]
    assert excess(Counter(drawn), expected) < 3.5
    likeliest = max(expected, key=lambda pair: expected[pair])
    kept = [likeliest if random.random() < 0.12 else pair for pair in drawn]
    assert excess(Counter(kept), expected) > 3.5


def test_one_long_sample_has_the_distribution_of_the_target() -> None:
    target, sampling = Target(4, 9, spread=1.0), Sampling(temperature=1.0, seed=11)
    tokens = [0, 1, *speculative(target, [0, 1], sampling, 12_000, planters(target, 0)["likeliest"])]
    for context in itertools.product(range(4), repeat=2):
        following = Counter(
            (c, 0) for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False) if (a, b) == context
        )
        chosen, probabilities = distribution(target.logits(context), sampling)
        expected = {(token, 0): p for token, p in zip(chosen.tolist(), probabilities.tolist(), strict=True)}
        assert excess(following, expected) < 4
