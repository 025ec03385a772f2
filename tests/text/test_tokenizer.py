"""The tokenizer: files there and back, BOS, incremental decoding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.errors import CheckpointError, UnsupportedModelError, UsageError
from flashrt.text.bpe import byte_alphabet, byte_level, merge_lines, sentencepiece
from flashrt.text.files import TextFiles
from flashrt.text.tokenizer import Tokenizer
from tests.families import BOS, EOS, SPECIAL, USER, VOCAB, tokenizer_json

TEXTS = (
    "Hello, world!",
    "  two spaces,\ttabs\n\n\nand lines  ",
    "naïve café – “quotes” … 你好，世界 🙂👩‍👩‍👧 e\u0301",
    "def f(x):\n    return x ** 2  # squared\n",
    "1234567 3.14159 0xDEADBEEF",
    "",
)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return Tokenizer.from_text(TextFiles(tokenizer_json(), None, {"bos_token": SPECIAL[BOS]}))


@pytest.fixture(scope="module")
def bytes_only() -> Tokenizer:
    """256 byte tokens and one special token: every text is covered, every character may be split."""
    tokens = [*byte_alphabet(), "<s>"]
    return Tokenizer.from_text(TextFiles(byte_level(tokens, [], [1] * 256 + [3], "gpt-2")))


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """A SentencePiece-like vocabulary with byte fallback and a prefix space."""
    words = ["▁", "a", "b", "▁a", "ab", "▁ab", "▁b", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * len(words)
    return Tokenizer.from_text(TextFiles(sentencepiece(tokens, scores, kinds, bos=1)))


def test_bos_is_added_once_and_only_when_wanted(tiny: Tokenizer) -> None:
    assert tiny.encode("the")[0] == BOS
    assert BOS not in tiny.encode("the", special=False)
    assert tiny.encode("<|user|>x</s>", special=False)[0] == USER
    assert tiny.encode("<|user|>x</s>", special=False)[-1] == EOS
    assert tiny.vocab == VOCAB


def test_bos_before_every_text_is_known() -> None:
    tokens, kinds, special = [*byte_alphabet(), "<s>"], [1] * 256 + [3], {"bos_token": "<s>"}
    adds = Tokenizer.from_text(TextFiles(byte_level(tokens, [], kinds, "gpt-2", bos=256), None, special))
    assert adds.bos == 256
    assert adds.encode("a") == [256, 97]
    assert Tokenizer.from_text(TextFiles(byte_level(tokens, [], kinds, "gpt-2"), None, special)).bos is None


def test_packs_that_ask_for_a_bos_beside_the_tokenizer_are_refused(tmp_path: Path) -> None:
    settings = json.loads(TextFiles(tokenizer_json()).to_files()["text.json"])
    for asks in (None, False):
        TextFiles.from_bytes({"tokenizer.json": b"", "text.json": json.dumps(settings | {"add_bos": asks}).encode()})
    with pytest.raises(CheckpointError, match="pack the checkpoint again"):
        TextFiles.from_bytes({"tokenizer.json": b"", "text.json": json.dumps(settings | {"add_bos": True}).encode()})


def test_files_there_and_back(tmp_path: Path) -> None:
    compact = json.dumps(json.loads(tokenizer_json()), separators=(",", ":"), ensure_ascii=False).encode()
    text = TextFiles(compact, "{{ x }}", {"eos_token": "</s>"}, {"temperature": 0.5})
    indented = replace(text, tokenizer=json.dumps(json.loads(compact), indent=4).encode())
    assert indented.to_files() == text.to_files()  # the size of the file stands for what loading it takes
    for name, data in text.to_files().items():
        (tmp_path / name).write_bytes(data)
    assert TextFiles.from_files(tmp_path) == text
    assert Tokenizer.from_files(tmp_path).encode("the") == Tokenizer.from_text(text).encode("the")
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        TextFiles.from_files(tmp_path)
    for changed in ({"generation": []}, {"special_tokens": None}, {"chat_template": 1}):
        (tmp_path / "text.json").write_text(json.dumps(json.loads(text.to_files()["text.json"]) | changed))
        with pytest.raises(CheckpointError, match=f"damaged: {next(iter(changed))} is"):
            TextFiles.from_files(tmp_path)
    (tmp_path / "text.json").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextFiles.from_files(tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "fine until \udcff", "\udfff\ud800"])
def test_text_that_is_not_unicode_is_refused(tiny: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match=r"not valid Unicode: character \d+ is U\+D"):
        tiny.encode(text)


def test_damaged_tokenizer_is_refused() -> None:
    for data in (b"{}", b"\xff", b"[1", tokenizer_json()[:-40]):
        with pytest.raises(CheckpointError):
            Tokenizer.from_text(TextFiles(data))


def stream_text(tokenizer: Tokenizer, ids: list[int], context: tuple[int, ...] = ()) -> str:
    stream = tokenizer.stream(context)
    pieces = [stream.push(i) for i in ids]
    return "".join(pieces) + stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_text(text: str, bytes_only: Tokenizer, pieces: Tokenizer) -> None:
    for tokenizer in (bytes_only, pieces):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        given_out = ""
        for i in ids:
            piece = stream.push(i)
            assert "\ufffd" not in piece
            given_out += piece
            assert text.startswith(given_out)
        assert given_out + stream.flush() == text


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_stream_of_any_text(text: str) -> None:
    tokenizer = Tokenizer.from_text(TextFiles(byte_level([*byte_alphabet()], [], [1] * 256, "gpt-2")))
    assert stream_text(tokenizer, tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, 255), max_size=60))
@settings(max_examples=60, deadline=None)
def test_stream_of_any_bytes_never_stalls(ids: list[int]) -> None:
    tokenizer = Tokenizer.from_text(TextFiles(byte_level([*byte_alphabet()], [], [1] * 256, "gpt-2")))
    found = stream_text(tokenizer, ids)
    kept = [c for c in bytes(ids).decode("utf-8", errors="ignore") if c != "\ufffd"]
    assert len(found) >= len(kept) // 2  # invalid bytes may hide neighbours, not everything


def test_stream_keeps_the_space_after_a_context(pieces: Tokenizer) -> None:
    prompt, more = pieces.encode("ab"), pieces.encode("ab ab", special=False)[1:]
    assert stream_text(pieces, more, tuple(prompt)) == " ab"
    assert stream_text(pieces, more) == "ab"


def test_stream_window_stays_small(bytes_only: Tokenizer) -> None:
    stream = bytes_only.stream()
    for _ in range(100):
        stream.push(256)
        stream.push(ord("a"))
        stream.push(0xFF - 0x100 + 256)
    assert len(stream._known) + len(stream._pending) < 40


def test_unknown_pre_tokenizer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'nobodys'.*known: .*smollm"):
        byte_level([*byte_alphabet()], [], [1] * 256, "nobodys")


def test_merges_that_are_no_pairs_are_refused() -> None:
    assert merge_lines("#version: 0.2\nt h\r\nth e\n\n") == [["t", "h"], ["th", "e"]]
    for damaged in ("th\n", "t h e\n"):
        with pytest.raises(CheckpointError, match="merges"):
            merge_lines(damaged)
