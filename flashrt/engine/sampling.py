"""Chooses the next token from its logits.

Works in at most one temporary of the size of the logits, whatever is asked: a vocabulary of 262,144 tokens takes 1 MiB
beside what it is given, and a quarter of that for a moment while tokens are ruled out or named. Nothing that is as long
as the vocabulary is indexed or held in float64; sums are float64, taken piece by piece.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import numpy as np

from flashrt.config import Sampling
from flashrt.engine.grammar import Grammar
from flashrt.engine.logprobs import Logprobs, likeliest, log_total

Array = np.ndarray

PIECE = 1 << 13  # weights whose running sum is held at a time
COLDEST = 1e-30  # lower temperatures, whose inverse float32 cannot hold, choose among equal logits only, as this does


class Sampler:
    """One sequence's sampler: the same seed and logits give the same tokens."""

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        top_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        """top_logprobs: how many tokens to name beside each that is chosen, in `logprobs`; None: nothing is noted.

        grammar: what rules tokens out, at the beginning of the text; it is copied
        """
        self.sampling = sampling
        self._grammar = None if grammar is None else grammar.copy()
        self.logprobs: deque[Logprobs] = deque()  # of tokens chosen, for the caller to take out
        self._top = top_logprobs
        self._random = np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None
        self._seen = set(prompt)
        self._chosen: Counter[int] = Counter()

    def copy(self) -> Sampler:
        """One in the same state: it chooses what this one would, and notes nothing."""
        other = Sampler(self.sampling, (), grammar=self._grammar)
        other._random, other._seen = copy.deepcopy(self._random), self._seen.copy()
        other._chosen = self._chosen.copy()
        return other

    def choose(self, logits: Array) -> int:
        """The next token. logits: float32 [vocab]; may be changed."""
        if self._top is None:
            token = self._choose(logits)
        else:
            total, beside = log_total(logits), likeliest(logits, self._top)
            top = tuple((token, float(logits[token]) - total) for token in beside)
            before = {token: float(logits[token]) for token in self._adjusted()}
            token = self._choose(logits)
            self.logprobs.append(Logprobs(before.get(token, float(logits[token])) - total, top))
        self._seen.add(token)
        self._chosen[token] += 1
        if self._grammar is not None:
            self._grammar.accept(token)
        return token

    def _choose(self, logits: Array) -> int:
        self._adjust(logits)
        return int(logits.argmax()) if self._random is None else self._draw(logits)

    def _adjusted(self) -> Iterator[int]:
        """Tokens whose logits `_adjust` may change, some of them twice."""
        if self.sampling.repetition_penalty != 1.0:
            yield from self._seen
        yield from self._chosen
        yield from (token for token, _ in self.sampling.logit_bias)

    def _adjust(self, logits: Array) -> None:
        sampling = self.sampling
        if sampling.repetition_penalty != 1.0:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values, penalty = logits[seen], sampling.repetition_penalty
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if sampling.presence_penalty or sampling.frequency_penalty:
            chosen = np.fromiter(self._chosen, np.int64, len(self._chosen))
            counts = np.fromiter(self._chosen.values(), np.float32, len(self._chosen))
            logits[chosen] -= np.float32(sampling.frequency_penalty) * counts + np.float32(sampling.presence_penalty)
        for token, bias in sampling.logit_bias:
            logits[token] += np.float32(bias)
        if self._grammar is not None:
            self._grammar.mask(logits)

    def _draw(self, logits: Array) -> int:
        assert self._random is not None
        weights = draw_weights(logits, self.sampling)
        return _reach(weights, self._random.random() * float(weights.sum(dtype=np.float64)), beyond=True)


def draw_weights(logits: Array, sampling: Sampling) -> Array:
    """How likely each token is to be drawn, relative to the most likely one; 0 for those ruled out. float32 [vocab]."""
    least, surplus = _cutoff(logits, sampling)
    weights = _relative(logits, sampling.temperature)
    if surplus:  # of tokens that are equally likely the first ones stay
        weights[np.flatnonzero(weights == least)[-surplus:]] = 0.0
    weights[weights < max(least, sampling.min_p)] = 0.0
    return weights


def _relative(logits: Array, temperature: float) -> Array:
    """exp((logits - the largest) / temperature), float32."""
    weights = np.subtract(logits, logits.max(), dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):  # what is too unlikely for float32 gets 0
        np.divide(weights, np.float32(max(temperature, COLDEST)), out=weights)
        return np.exp(weights, out=weights)


def _cutoff(logits: Array, sampling: Sampling) -> tuple[float, int]:
    """What top_k and top_p leave: the smallest weight that stays, and how many tokens of just that weight do not."""
    limited = 0 < sampling.top_k < len(logits)
    if not limited and sampling.top_p == 1.0:
        return 0.0, 0
    weights = _relative(logits, sampling.temperature)
    largest = weights
    if limited:
        weights.partition(len(weights) - sampling.top_k)
        largest = weights[-sampling.top_k :]
    count = len(largest)
    if sampling.top_p < 1.0:
        largest.sort()
        count = _reach(largest[::-1], sampling.top_p * float(largest.sum(dtype=np.float64))) + 1
        least = float(largest[-count])
    else:
        least = float(largest.min())
    return least, int(np.count_nonzero(weights >= least)) - count


def _reach(values: Array, goal: float, beyond: bool = False) -> int:
    """The first index at which the running sum of `values` reaches `goal`, or with `beyond` exceeds it.

    Where rounding keeps the sum from getting there, the index of the largest value.
    """
    total = 0.0
    for begin in range(0, len(values), PIECE):
        running = np.cumsum(values[begin : begin + PIECE], dtype=np.float64)
        running += total
        index = int(np.searchsorted(running, goal, side="right" if beyond else "left"))
        if index < len(running):
            return begin + index
        total = float(running[-1])
    return int(values.argmax())
