"""Pieces of text to calibrate with: cut from a text, or written by the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flashrt.calibration.divergence import predicted
from flashrt.config import Sampling
from flashrt.engine.engine import Engine
from flashrt.engine.sampling import Sampler
from flashrt.errors import UsageError
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.limits import NARROW_TOKENS

WINDOW = 128  # tokens of one piece of text
LEAST_WINDOWS = 6
FITTED = 0.5  # of the text, its beginning; the first half of the rest sets the price of loss, the other checks it
PROBED = 96  # tokens on which each block's weight is measured
TOP_P = 0.9  # of the probability that text written by the model is drawn from

Windows = list[list[int]]


@dataclass(frozen=True, slots=True)
class Split:
    """The windows to fit to, to weigh blocks with, to choose by and to check with.

    Stretches, since neighbours in a text know each other. Those to weigh with are beginnings of those fitted to.
    """

    fitted: Windows
    probe: Windows
    tuning: Windows
    checking: Windows

    @classmethod
    def of(cls, windows: Windows) -> Split:
        first = round(FITTED * len(windows))
        second = (first + len(windows)) // 2
        return cls(windows[:first], _beginnings(windows[:first], PROBED), windows[first:second], windows[second:])

    @property
    def compared(self) -> dict[str, Windows]:
        """By name, those whose predictions are compared, in the order in which they are recorded."""
        return {"probe": self.probe, "tuning": self.tuning, "checking": self.checking}

    def first_row(self, name: str) -> int:
        """How many tokens are predicted in the windows that are recorded before those of this name."""
        before = itertools.takewhile(lambda other: other != name, self.compared)
        return sum(predicted(self.compared[other]) for other in before)


def cut(tokenizer: Tokenizer, text: str, length: int, tokens: int, least: int = LEAST_WINDOWS) -> Windows:
    """Pieces spread evenly over a text, each beginning as texts do.

    Raises UsageError when the text is shorter than `least` of them.
    """
    ids, prefix = tokenizer.encode(text, special=False), tokenizer.encode("")
    check_enough(len(ids), least * (length - len(prefix)))
    return spread(ids, prefix, length, tokens // length)


def spread(ids: Sequence[int], prefix: Sequence[int], length: int, count: int) -> Windows:
    """At most `count` pieces spread evenly over `ids`, each `length` tokens with the `prefix` that begins it."""
    step = length - len(prefix)
    whole = [[*prefix, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    return [whole[i] for i in np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)]


def check_enough(tokens: int, least: int) -> None:
    """Raises UsageError for a text that is too short."""
    if tokens < least:
        raise UsageError(
            f"the text has {tokens} tokens, calibration takes {least} or more: give a longer file, or none"
        )


def written(engine: Engine, seed: int, length: int, progress: Callable[[int], None] = lambda done: None) -> list[int]:
    """A piece of text by the model itself: one token drawn blindly, the rest from the likelier of its predictions.

    So calibration needs no data (Liu et al., LLM-QAT, arXiv:2305.17888, section 3.1). Drawn from all predictions, text
    that began with a blind token stays odd, and loses twice as much as people's text does.
    """
    prefix = engine.tokenizer.encode("")
    start = int(np.random.default_rng(seed).integers(engine.spec.vocab))
    ids = [*prefix, start]
    sampler = Sampler(Sampling(temperature=1.0, top_p=TOP_P, seed=seed), ids)
    logits = engine.runner.prefill(engine.sequence, ids)
    while len(ids) < length:
        token = sampler.choose(logits)
        ids.append(token)
        if len(ids) < length:
            logits = engine.runner.step(engine.sequence, token)
        progress(len(ids))
    engine.sequence.rewind(0)
    return ids


def _beginnings(windows: Windows, tokens: int) -> Windows:
    """The beginnings of a few windows, about `tokens` tokens in all."""
    each = 2 * NARROW_TOKENS + 1
    return [window[:each] for window in windows[: max(tokens // (2 * NARROW_TOKENS), 1)]]
