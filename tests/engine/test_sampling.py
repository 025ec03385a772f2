"""Drawing tokens: against a plain computation, at extremes, and in bounded memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.config import Sampling
from flashrt.engine.logprobs import likeliest
from flashrt.engine.sampling import Sampler
from flashrt.errors import UsageError
from tests.distribution import distribution


def plain(logits: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """Token → probability, as the documentation of `Sampling` says, one step after the other."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k or None]
    weights = [math.exp((float(logits[i]) - float(logits[order[0]])) / sampling.temperature) for i in order]
    whole, kept, total = sum(weights), {}, 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and ((sampling.top_p < 1 and total >= sampling.top_p * whole) or weight < sampling.min_p):
            break
        kept[token] = weight
        total += weight
    return {token: weight / total for token, weight in kept.items()}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([1, 2, 7, 300, 20_000]),
    st.sampled_from([0.1, 0.7, 1.0, 50.0]),
    st.sampled_from([0, 1, 5, 40]),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.03, 1.0]),
)
def test_against_a_plain_computation(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * 4
    sampling = Sampling(temperature, top_k, top_p, min_p)
    expected = plain(logits, sampling)
    tokens, probabilities = distribution(logits, sampling)
    found = dict(zip(tokens.tolist(), probabilities.tolist(), strict=True))
    # A token on the edge may fall to either side, and what is too unlikely for float32 may be missing.
    for token in found.keys() ^ expected.keys():
        edge = min(expected.values())
        assert found.get(token, expected.get(token)) <= 1.001 * edge or expected.get(token, 1) < 1e-30
    assert len(found.keys() ^ expected.keys()) <= 1 or min(expected.values()) < 1e-30
    for token in found.keys() & expected.keys():
        assert found[token] == pytest.approx(expected[token], rel=1e-3)


def test_frequencies_are_the_probabilities() -> None:
    logits = np.log(np.array([5, 1, 3, 1], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [])
    counts = np.bincount([sampler.choose(logits.copy()) for _ in range(8000)], minlength=4)
    assert counts / 8000 == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.02)


def test_ties_stay_in_the_order_of_the_vocabulary() -> None:
    logits = np.zeros(10, np.float32)
    assert distribution(logits, Sampling(temperature=1.0, top_k=3))[0].tolist() == [0, 1, 2]
    assert distribution(logits, Sampling(temperature=1.0, top_p=0.35))[0].tolist() == [0, 1, 2, 3]


def test_the_penalty_counts_the_prompt_and_what_was_chosen() -> None:
    logits, seen = np.array([-1.0, 5.0, 4.0, 1.5], np.float32), {1, 0}
    sampler = Sampler(Sampling(repetition_penalty=4.0), sorted(seen))
    for expected in (2, 3, 1):  # 4 beats 5 / 4, then 1.5 beats 4 / 4, then 5 / 4 beats 1.5 / 4
        penalized = [x if i not in seen else x / 4 if x > 0 else x * 4 for i, x in enumerate(logits.tolist())]
        assert int(np.argmax(penalized)) == expected
        given = logits.copy()
        assert sampler.choose(given) == expected
        assert given.tolist() == penalized
        seen.add(expected)


@pytest.mark.parametrize("temperature", [1e-308, 5e-324, 1e-40, 1e-3])
def test_temperatures_next_to_zero_are_greedy(temperature: float) -> None:
    logits = np.array([1.0, 80.0, 79.9, -3e38], np.float32)
    sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, seed=1), [])
    assert [sampler.choose(logits.copy()) for _ in range(20)] == [1] * 20


@pytest.mark.parametrize("top_logprobs", [None, 20])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.99}, {"top_p": 0.9999, "top_k": 200_000}])
@pytest.mark.parametrize("temperature", [0.7, 100.0])
def test_a_large_vocabulary_takes_little_memory(
    options: dict[str, float], temperature: float, top_logprobs: int | None
) -> None:
    logits = np.random.default_rng(0).normal(size=262_144).astype(np.float32) * 3
    sampling = Sampling(temperature=temperature, seed=0, min_p=0.0, **options)  # type: ignore[arg-type]
    sampler = Sampler(sampling, [1, 2, 3], top_logprobs)
    sampler.choose(logits.copy())
    tracemalloc.start()
    try:
        sampler.choose(logits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.4 * logits.nbytes


def test_penalties_count_the_answer_and_a_bias_is_added() -> None:
    logits = np.array([0.0, 3.0, 2.9, 2.5, -9.0], np.float32)
    sampling = Sampling(presence_penalty=0.25, frequency_penalty=0.5, logit_bias=((4, 10.5), (1, -1.0)))
    sampler, counts = Sampler(sampling, [2, 2, 3]), [0] * 5
    for _ in range(8):
        adjusted = [x - 0.5 * n - 0.25 * (n > 0) for x, n in zip(logits.tolist(), counts, strict=True)]
        adjusted[4] += 10.5
        adjusted[1] -= 1.0
        token = sampler.choose(logits.copy())
        assert token == int(np.argmax(adjusted))
        counts[token] += 1
    assert max(counts) > 1


def test_a_negative_penalty_repeats() -> None:
    sampler = Sampler(Sampling(frequency_penalty=-2.0, temperature=1.0, seed=4), [])
    tokens = [sampler.choose(np.zeros(50, np.float32)) for _ in range(60)]
    assert len(set(tokens[20:])) == 1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_are_those_of_the_model(temperature: float) -> None:
    """Whatever parameters make of its logits."""
    random = np.random.default_rng(2)
    sampling = Sampling(
        temperature, top_k=9, repetition_penalty=1.7, seed=1, presence_penalty=1, logit_bias=((5, 90), (6, -90))
    )
    sampler, other = Sampler(sampling, [1, 2, 5], top_logprobs=4), Sampler(sampling, [1, 2, 5])
    for _ in range(12):
        logits = random.normal(size=20_000).astype(np.float32) * 3
        exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
        token = sampler.choose(logits.copy())
        assert token == other.choose(logits.copy())
        noted = sampler.logprobs.popleft()
        assert noted.logprob == pytest.approx(exact[token], abs=1e-9)
        assert [token for token, _ in noted.top] == np.argsort(-exact, kind="stable")[:4].tolist()
        assert [value for _, value in noted.top] == pytest.approx(np.sort(exact)[::-1][:4].tolist(), abs=1e-9)
    assert not sampler.logprobs


def test_of_equal_logits_the_first_are_named() -> None:
    assert likeliest(np.zeros(9, np.float32), 3) == [0, 1, 2]
    assert likeliest(np.array([1, 2], np.float32), 5) == [1, 0]
    assert likeliest(np.array([1, 2], np.float32), 0) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"logit_bias": ((1, 101.0),)},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((1, float("nan")),)},
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)  # type: ignore[arg-type]
