"""Whether a model finds what a long prompt says: exact match of greedy answers about synthetic haystacks.

A haystack is prefilled once, in wide passes, for all its questions. Questions and answers are computed in narrow
passes, of at most 16 tokens, as decoding computes them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flashrt.calibration.haystack import FORMS, Frame, Haystack, Needle, make_haystack
from flashrt.engine.engine import Engine
from flashrt_kernels.limits import NARROW_TOKENS

ANSWER_TOKENS = 32  # an answer that has not ended by then is wrong

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """What is asked: of each form and length (tokens of a prompt) `samples` haystacks, of each `needles` questions."""

    lengths: Sequence[int]
    needles: int
    samples: int
    seed: int

    @property
    def questions(self) -> int:
        return len(FORMS) * len(self.lengths) * self.samples * self.needles

    def haystacks(self, frame: Frame) -> Iterator[Haystack]:
        """One after the other, the same for the same seed and tokenizer. Raises UsageError; see `make_haystack`."""
        for length in self.lengths:
            for form in FORMS:
                for sample in range(self.samples):
                    choice = random.Random(f"{self.seed} {form.name} {length} {sample}")
                    yield make_haystack(form, frame, length, self.needles, choice)


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found for a needle."""

    task: str
    length: int
    depth: float
    expected: str
    found: str

    @property
    def correct(self) -> bool:
        return self.found == self.expected


@dataclass(slots=True)
class Pace:
    """Tokens computed so far, and the seconds that they took: of haystacks, and of answers."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    answer_tokens: int = 0
    answer_s: float = 0.0


def answers(engine: Engine, trial: Trial, pace: Pace, progress: Progress) -> Iterator[Answer]:
    """Ask everything, and keep `pace`. Needs a plan with `logit_rows` of 16 and room for ANSWER_TOKENS."""
    done = 0
    for haystack in trial.haystacks(Frame.of(engine.tokenizer)):
        engine.sequence.rewind(0)
        for needle in haystack.needles:
            found = ask(engine, haystack, needle, pace)
            yield Answer(haystack.form.name, haystack.length, needle.depth, needle.answer, found)
            done += 1
            progress(done, trial.questions)


def ask(engine: Engine, haystack: Haystack, needle: Needle, pace: Pace) -> str:
    """The greedy answer to a question, up to what closes a value. The sequence may hold the haystack already."""
    runner, sequence, eos = engine.runner, engine.sequence, engine.spec.eos
    began = time.perf_counter()
    if sequence.rewind(min(sequence.length, len(haystack.ids))) < len(haystack.ids):
        runner.prefill(sequence, haystack.ids)
        pace.prefill_tokens += len(haystack.ids)
        pace.prefill_s += time.perf_counter() - began
    for begin in range(0, len(needle.question), NARROW_TOKENS):
        logits = runner.step_batch(sequence, needle.question[begin : begin + NARROW_TOKENS])[-1]
    ids, text, began = list[int](), "", time.perf_counter()
    while len(ids) < ANSWER_TOKENS and haystack.form.closing not in text:
        token = int(logits.argmax())
        if token in eos:
            break
        ids.append(token)
        text = engine.tokenizer.decode(ids)
        logits = runner.step(sequence, token)
    pace.answer_tokens += len(ids)
    pace.answer_s += time.perf_counter() - began
    return text.partition(haystack.form.closing)[0]
