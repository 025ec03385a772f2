"""Drafts by a cheaper model: the resident neurons of the model itself, or a small checkpoint beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from flashrt.config import Sampling
from flashrt.speculate.acceptance import Chooser
from flashrt.speculate.drafter import Candidate

Array = np.ndarray

WIDTH = 3  # tokens that are proposed for one place: the one that the draft goes on with, and others beside it


class Sampler(Chooser, Protocol):
    """A sequence's sampler."""

    sampling: Sampling

    def copy(self) -> Sampler:
        """One in the same state: it chooses what this one would."""


class DraftModel(Protocol):
    """A model that is cheaper than the one it drafts for, and takes the same tokens."""

    def follow(self, tokens: Sequence[int]) -> None:
        """These tokens are certain now."""

    def catch_up(self) -> None:
        """Compute what is certain, up to the few tokens that a step takes along."""

    def draft(self, token: int, depth: int) -> Array | None:
        """Logits of what follows `token`, float32 [vocab], which may be changed; None where there is no more room.

        Depth 0 is the last certain token, 1 a token drafted to follow it, and so on.
        """


class ModelDrafter:
    """A `Drafter` that runs a model token by token, along its own choices.

    They are those of a copy of the sequence's sampler, by the same random numbers: so a draft agrees as often as can be
    with what the sampler will make of the true logits (`acceptance`).
    """

    def __init__(self, name: str, model: DraftModel, sampler: Sampler) -> None:
        self._name, self._model, self._sampler = name, model, sampler
        self._last = -1

    @property
    def name(self) -> str:
        return self._name

    def accept(self, tokens: Sequence[int]) -> None:
        """See `Drafter.accept`."""
        self._model.follow(tokens)
        self._last = tokens[-1]

    def propose(self) -> Iterator[list[Candidate]]:
        """See `Drafter.propose`: a step is a pass of the model."""
        self._model.catch_up()
        return self._steps()

    def _steps(self) -> Iterator[list[Candidate]]:
        path: tuple[int, ...] = ()
        sampler, token = self._sampler.copy(), self._last
        while (logits := self._model.draft(token, len(path))) is not None:
            weights = _likelihoods(logits, sampler.sampling.temperature or 1.0)
            token = sampler.choose(logits)
            yield [Candidate((*path, choice), float(weights[choice])) for choice in _choices(weights, token)]
            path = (*path, token)


def _likelihoods(logits: Array, temperature: float) -> Array:
    weights = logits - logits.max()
    weights /= np.float32(temperature)
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights


def _choices(weights: Array, first: int) -> list[int]:
    """`first`, then the likeliest others."""
    choices, hidden = [first], [float(weights[first])]
    while len(choices) < WIDTH:
        weights[choices[-1]] = -1.0
        choices.append(int(weights.argmax()))
        hidden.append(float(weights[choices[-1]]))
    weights[choices] = hidden
    return choices
