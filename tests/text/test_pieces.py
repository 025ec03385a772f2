"""tokenizer.model and tekken.json against records of the sentencepiece library (0.2.3) and mistral_common (1.13.1)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.errors import CheckpointError, FlashrtError, UnsupportedModelError
from flashrt.text.files import TextFiles
from flashrt.text.pieces import read_pieces
from flashrt.text.tekken import special_of, tekken_tokenizer
from flashrt.text.tokenizer import Tokenizer
from flashrt.text.wire import fields

DATA = Path(__file__).parent / "data"
RECORDED: dict[str, list[Any]] = json.loads((DATA / "sentencepiece.json").read_text())
TEKKEN: dict[str, Any] = json.loads((DATA / "tekken.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_pieces_as_sentencepiece(name: str) -> None:
    """Byte fallback or none, spaces before texts or not, rules of characters, unigram, tokens of users."""
    pieces = read_pieces((DATA / f"{name}.model").read_bytes())
    tokenizer = Tokenizer.from_text(TextFiles(pieces.tokenizer()))
    for text, ids in RECORDED[name]:
        assert tokenizer.encode(text) == ids, text
    assert pieces.special == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_prefixes_as_transformers(scheme: str) -> None:
    """What transformers' LlamaTokenizer puts before words, as its own pre-tokenizer does."""
    pieces = read_pieces((DATA / "llama.model").read_bytes())
    tokenizer = Tokenizer.from_text(TextFiles(pieces.tokenizer(scheme)))
    found = "".join(pieces.pieces[i] for i in tokenizer.encode("the<tool>the"))
    expected = {"first": "_the<tool>the", "always": "_the<tool>_the", "never": "the<tool>the"}[scheme]
    assert found == expected.replace("_", "\u2581")


def message(*parts: tuple[int, int | bytes]) -> bytes:
    """A protocol buffer."""
    result = b""
    for number, value in parts:
        kind, body = (0, varint(value)) if isinstance(value, int) else (2, varint(len(value)) + value)
        result += varint(number << 3 | kind) + body
    return result


def varint(value: int) -> bytes:
    result = b""
    while value > 0x7F:
        result, value = result + bytes([value & 0x7F | 0x80]), value >> 7
    return result + bytes([value])


@pytest.mark.parametrize(
    ("trainer", "normalizer", "words"),
    [
        ([(3, 3)], [], "'word'"),
        ([(3, 4)], [], "'char'"),
        ([(3, 2), (24, 1)], [], "behind words"),
        ([(3, 2)], [(5, 0)], "as they are"),
    ],
)
def test_rules_that_are_not_known_are_named(trainer: list[Any], normalizer: list[Any], words: str) -> None:
    data = message((1, message((1, b"a"))), (2, message(*trainer)), (3, message(*normalizer)))
    with pytest.raises(UnsupportedModelError, match=words):
        read_pieces(data)


def test_a_tiktoken_file_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="tiktoken"):
        read_pieces(b"IQ== 0\nIg== 1\n")


@pytest.mark.parametrize("cut", [1, 100, 2000, 5000])
def test_damaged_pieces_are_refused(cut: int) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        read_pieces((DATA / "llama.model").read_bytes()[:-cut] + b"\xff")


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_bytes_end_in_one_error(data: bytes) -> None:
    try:
        read_pieces(data)
    except FlashrtError:
        return


def test_numbers_that_never_end() -> None:
    for data in (b"\x80" * 20, b"\x0a\xff\xff\xff\x7f", b"\x0b"):
        with pytest.raises(ValueError, match="at byte"):
            list(fields(data))


def test_tekken_as_mistral_common() -> None:
    tokenizer = Tokenizer.from_text(TextFiles(tekken_tokenizer(TEKKEN["tekken"])))
    for text, ids in TEKKEN["texts"]:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("[INST]<SPECIAL_7>") == [3, 7]
    assert special_of(TEKKEN["tekken"]) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("special_tokens"), "names no special tokens"),
        (lambda d: d["special_tokens"].pop(0), "numbered from 0"),
        (lambda d: d["vocab"][3].update(rank=9), "order of ranks"),
        (lambda d: d["vocab"][3].update(token_bytes="!"), "damaged"),
        (lambda d: d["vocab"][3].update(token_bytes=d["vocab"][4]["token_bytes"]), "order of ranks"),
        (lambda d: d.pop("config"), "damaged"),
        (lambda d: d["config"].update(default_num_special_tokens=2), "special tokens"),
        (lambda d: d["config"].update(default_vocab_size="x"), "damaged"),
    ],
)
def test_damaged_tekken_is_refused(change: Any, words: str) -> None:
    document = copy.deepcopy(TEKKEN["tekken"])
    change(document)
    with pytest.raises(CheckpointError, match=words):
        tekken_tokenizer(document)
