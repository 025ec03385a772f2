"""The tokens that `flashrt eval` scores."""

from __future__ import annotations

import pytest

from flashrt.cli.texts import first_ids
from flashrt.text.files import TextFiles
from flashrt.text.tokenizer import Tokenizer
from tests.families import BOS, SPECIAL, tokenizer_json


class Counting(Tokenizer):
    longest = 0

    def encode(self, text: str, special: bool = True) -> list[int]:
        self.longest = max(self.longest, len(text))
        return super().encode(text, special)


@pytest.fixture
def tokenizer() -> Counting:
    tokenizer = Counting.from_text(TextFiles(tokenizer_json(), None, {"bos_token": SPECIAL[BOS]}))
    assert isinstance(tokenizer, Counting)
    return tokenizer


@pytest.mark.parametrize("text", ["some words, and more of them\n" * 4000, " " * 60_000 + "words " * 9000, "short"])
@pytest.mark.parametrize("count", [2, 100, 3000, 1 << 20, None])
def test_the_first_tokens_are_those_of_the_whole_text(tokenizer: Counting, text: str, count: int | None) -> None:
    whole = tokenizer.encode(text, special=False)
    assert first_ids(tokenizer, text, count) == whole[:count]


def test_no_more_is_encoded_than_that_takes(tokenizer: Counting) -> None:
    assert len(first_ids(tokenizer, "some words, and more of them\n" * 100_000, 100)) == 100
    assert tokenizer.longest < 2000
