"""Asking for needles: what is prefilled, in which passes the rest is computed, and which answers count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashrt.calibration.haystack import FORMS, Frame, Haystack, Needle
from flashrt.calibration.retrieval import ANSWER_TOKENS, Answer, Pace, Trial, answers, ask
from flashrt.text.files import TextFiles
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import EOS, TEMPLATE, VOCAB, tiny_checkpoint, tokenizer_json

LINE, PAIR = FORMS


class Scripted:
    """Stands for engine, runner and sequence: says what it is told to, and notes what it computes.

    `reach`: how many tokens it can be cut back by.
    """

    def __init__(self, says: str, reach: int = 1000) -> None:
        self.tokenizer = Tokenizer.from_text(TextFiles(tokenizer_json(), TEMPLATE, {}))
        self.runner = self.sequence = self
        self.spec = SimpleNamespace(eos=(EOS,))
        self._says, self._reach = self.tokenizer.encode(says, special=False), reach
        self.length, self.prefilled, self.passes = 0, 0, list[int]()

    def rewind(self, length: int) -> int:
        self.length = length if self.length - length <= self._reach else 0
        return self.length

    def prefill(self, _: Any, ids: list[int]) -> None:
        self.length, self.prefilled = len(ids), self.prefilled + 1

    def step_batch(self, _: Any, tokens: list[int]) -> np.ndarray:
        self.length, self._next = self.length + len(tokens), 0
        self.passes.append(len(tokens))
        return np.stack([self._logits()] * len(tokens))

    def step(self, _: Any, token: int) -> np.ndarray:
        self.length, self._next = self.length + 1, self._next + 1
        return self._logits()

    def _logits(self) -> np.ndarray:
        logits = np.zeros(VOCAB, np.float32)
        logits[self._says[self._next] if self._next < len(self._says) else EOS] = 1
        return logits


def asked(says: str, form: Any = LINE, questions: int = 1, reach: int = 1000) -> tuple[str, Scripted, Pace]:
    engine, pace = Scripted(says, reach), Pace()
    haystack = Haystack(form, 60, list(range(20)), [Needle(0.5, list(range(40)), "1234")])
    for _ in range(questions):
        found = ask(engine, haystack, haystack.needles[0], pace)  # type: ignore[arg-type]
    return found, engine, pace


@pytest.mark.parametrize(
    ("form", "says", "found"),
    [
        (LINE, "1234>\nand more", "1234"),
        (LINE, "1234", "1234"),  # and the end of the text
        (LINE, " 1234>", " 1234"),
        (LINE, "", ""),
        (PAIR, '1234",', "1234"),
        (PAIR, "1234>", "1234>"),
        (LINE, "1234 " * 40, ("1234 " * 40)[:ANSWER_TOKENS]),
    ],
)
def test_an_answer_ends_where_the_value_is_closed(form: Any, says: str, found: str) -> None:
    assert asked(says, form)[0] == found


def test_only_exact_answers_are_right() -> None:
    right = [Answer("line", 60, 0.5, "1234", found).correct for found in ("1234", "1234 ", " 1234", "12345", "123", "")]
    assert right == [True, False, False, False, False, False]


def test_the_haystack_is_prefilled_once_and_the_rest_is_narrow() -> None:
    _, engine, pace = asked("1234>", questions=3)
    assert engine.prefilled == 1
    assert engine.passes == [NARROW_TOKENS, NARROW_TOKENS, 8] * 3
    assert (pace.prefill_tokens, pace.answer_tokens) == (20, 15)


def test_a_haystack_that_cannot_be_cut_back_to_is_prefilled_again() -> None:
    assert asked("1234>", questions=3, reach=44)[1].prefilled == 3
    assert asked("1234>", questions=3, reach=45)[1].prefilled == 1


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp(request.param)
    _, checkpoint = tiny_checkpoint(request.param, folder / "checkpoint", max_position_embeddings=2048)
    packed = make_pack(checkpoint, folder / "pack", Codec.F32)
    with tiny_engine(packed, 1, context=1000, logit_rows=NARROW_TOKENS) as made:
        yield made


def test_answers_are_those_of_generation(engine: Any) -> None:
    """With windows too, which a question and its answer are too long to be cut back by."""
    trial = Trial([700, 900], needles=2, samples=1, seed=5)
    steps: list[tuple[int, int]] = []
    found = list(answers(engine, trial, Pace(), lambda done, total: steps.append((done, total))))
    assert steps == [(i + 1, 8) for i in range(8)]
    assert [(answer.task, answer.length) for answer in found[::2]] == [
        (form.name, length) for length in (700, 900) for form in FORMS
    ]
    expected = []
    for haystack in trial.haystacks(Frame.of(engine.tokenizer)):
        for needle in haystack.needles:
            generation = engine.generate([*haystack.ids, *needle.question], ANSWER_TOKENS)
            ids = [token.id for token in generation if token.id not in engine.spec.eos]
            text = engine.tokenizer.decode(ids)
            expected.append((needle.depth, needle.answer, text.partition(haystack.form.closing)[0]))
    assert [(answer.depth, answer.expected, answer.found) for answer in found] == expected
