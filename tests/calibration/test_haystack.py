"""Prompts of retrieval: exactly as long as asked for, the same for a seed, with needles where they are said to be."""

from __future__ import annotations

import random

import pytest

from flashrt.calibration.haystack import FORMS, Form, Frame, Haystack, make_haystack
from flashrt.errors import CheckpointError, UsageError
from flashrt.text.files import TextFiles
from flashrt.text.tokenizer import Tokenizer
from tests.families import BOS, SPECIAL, TEMPLATE, tokenizer_json

TOKENS = {"bos_token": SPECIAL[BOS], "eos_token": "</s>"}
FORM_IDS = [form.name for form in FORMS]


def tokenizer(template: str | None) -> Tokenizer:
    return Tokenizer.from_text(TextFiles(tokenizer_json(), template, TOKENS))


def haystack(form: Form, length: int, needles: int = 3, seed: int = 0, template: str | None = TEMPLATE) -> Haystack:
    return make_haystack(form, Frame.of(tokenizer(template)), length, needles, random.Random(seed))


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
@pytest.mark.parametrize("template", [TEMPLATE, None])
@pytest.mark.parametrize("length", [701, 702, 703, 1000, 2049])
def test_every_prompt_is_as_long_as_asked_for(form: Form, template: str | None, length: int) -> None:
    for seed in range(3):
        made = haystack(form, length, seed=seed, template=template)
        assert {len(made.ids) + len(needle.question) for needle in made.needles} == {length}


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_needles_lie_in_equal_parts_and_say_what_is_expected(form: Form) -> None:
    made, encoder = haystack(form, 3000, needles=7), tokenizer(TEMPLATE)
    text = encoder.decode(made.ids)
    for i, needle in enumerate(made.needles):
        cue = encoder.decode(needle.question).rpartition("\n")[2].removeprefix("<|user|>")
        assert text.count(cue) == 1, "one line answers the question"
        said = text[text.index(cue) + len(cue) :]
        assert said.startswith(needle.answer + form.closing)
        assert i / 7 - 0.05 <= needle.depth <= (i + 1) / 7 + 0.05
        assert text.index(cue) / len(text) == pytest.approx(needle.depth, abs=0.15)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_a_seed_says_everything(form: Form) -> None:
    assert haystack(form, 900) == haystack(form, 900)
    assert haystack(form, 900).ids != haystack(form, 900, seed=1).ids


def test_a_chat_template_is_put_around_the_message() -> None:
    frame = Frame.of(tokenizer(TEMPLATE))
    assert frame.tokenizer.decode(frame.before, skip_special=False) == "<s><|user|>"
    assert frame.tokenizer.decode(frame.after, skip_special=False) == "</s>"
    question = frame.tokenizer.decode(frame.question(FORMS[0], "a-b"), skip_special=False)
    assert question.endswith("</s>line a-b: REGISTER_CONTENT is <")
    base = Frame.of(tokenizer(None))
    assert (base.before, base.after) == ([BOS], [])


def test_a_template_that_hides_the_message_is_refused() -> None:
    with pytest.raises(CheckpointError, match="shows a message 0 times"):
        Frame.of(tokenizer("{{ bos_token }}"))
    with pytest.raises(CheckpointError, match="shows a message 2 times"):
        Frame.of(tokenizer("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}"))


def test_too_short_for_the_needles() -> None:
    with pytest.raises(UsageError, match="has room for 0 lines"):
        haystack(FORMS[0], 40)
    with pytest.raises(UsageError, match="90 needles were asked for"):
        haystack(FORMS[1], 1000, needles=90)


def test_names_of_lines_run_out() -> None:
    with pytest.raises(UsageError, match="ask for shorter prompts"):
        haystack(FORMS[0], 1_400_000)
