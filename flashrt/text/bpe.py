"""tokenizer.json from the pieces other formats keep: a vocabulary, merges or scores, token types.

Byte-level BPE (GPT-2's and its descendants', which differ in how they split text) and SentencePiece-like BPE (spaces as
U+2581, unknown characters as byte tokens).
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flashrt.errors import CheckpointError
from flashrt.text.splits import Split, split_of

SPACE = "\u2581"
Around = tuple[tuple[str, int] | None, tuple[str, int] | None]  # (token, id) before and after every text
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_NEVER = -1e9  # the score of a token that no text is cut into


def byte_level(
    tokens: Sequence[str],
    merges: Sequence[str],
    kinds: Sequence[int],
    split: str,
    bos: int | None = None,
    eos: int | None = None,
) -> bytes:
    """tokenizer.json of a byte-level BPE that splits text as `split` names it (see `SPLITS`).

    bos, eos: ids put before and after every text, None for none
    """
    vocab = _byte_vocab(tokens, kinds)
    return byte_level_files(
        vocab,
        [merge.split(" ", 1) for merge in merges],
        split_of(split),
        added=_added_tokens(tokens, kinds, vocab),
        around=(_named(tokens, bos), _named(tokens, eos)),
    )


def byte_level_files(
    vocab: dict[str, int],
    merges: Iterable[Sequence[str]],
    split: Split,
    *,
    added: list[dict[str, Any]] | None = None,
    around: Around = (None, None),
    prefix_space: bool = False,
) -> bytes:
    """tokenizer.json from a vocabulary and merges written in the byte alphabet, as vocab.json and merges.txt hold them.

    prefix_space: a word at the beginning is spelled like any other, with a space before it
    """
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return _document(
        model=_bpe(vocab, merges, ignore_merges=split.whole_words),
        added=added or [],
        normalizer={"type": "NFC"} if split.nfc else None,
        pre_tokenizer=split.pre_tokenizer(prefix_space),
        decoder=level,
        around=around,
    )


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """How a SentencePiece vocabulary is used.

    prefix: 'prepend' puts a space before every text, also one that starts with a space, as the sentencepiece library,
    llama.cpp and Llama 2's own tokenizer.json do; 'always' and 'first' are what transformers' Llama class does, before
    every text or the first between special tokens, but not before a space; 'never'
    unigram: the most likely of all ways to cut a text is taken, and merges are not
    byte_fallback: what has no token is spelled in bytes
    charsmap: SentencePiece's compiled rules that characters are replaced by
    squeeze: runs of spaces become one, those at the ends of a text none
    gemma: runs of spaces are tokens spelled with spaces, and merges follow the vocabulary's order, not its scores
    """

    prefix: str = "prepend"
    unigram: bool = False
    byte_fallback: bool = True
    charsmap: bytes = b""
    squeeze: bool = False
    gemma: bool = False

    def normalizer(self) -> dict[str, Any] | None:
        steps: list[dict[str, Any]] = []
        if self.charsmap:
            steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(self.charsmap).decode()})
        if self.squeeze:
            steps += [
                {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ]
        if self.prefix == "prepend":
            steps.append({"type": "Prepend", "prepend": SPACE})
        if self.prefix in ("prepend", "never"):
            steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
        return {"type": "Sequence", "normalizers": steps} if steps else None

    def pre_tokenizer(self) -> dict[str, Any] | None:
        if self.prefix in ("prepend", "never"):
            return None
        return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": self.prefix, "split": False}

    def decoder(self) -> dict[str, Any]:
        steps: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if self.prefix != "never":
            steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        return {"type": "Sequence", "decoders": steps}


def sentencepiece(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    rules: SentencePieces | None = None,
    merges: Sequence[str] | None = None,
    bos: int | None = None,
    eos: int | None = None,
) -> bytes:
    """tokenizer.json of a SentencePiece vocabulary. Raises UnsupportedModelError for one that cannot be written so."""
    rules = rules or SentencePieces()
    spelled = [SPACE * len(t) if rules.gemma and t and not t.strip(" ") else t for t in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    unknown = next((i for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    if rules.unigram:
        model = _unigram(spelled, scores, kinds, unknown, rules.byte_fallback)
    else:
        if merges is not None:
            pairs: Iterable[Sequence[str]] = (merge.split(" ", 1) for merge in merges)
        else:
            order = [-float(i) for i in range(len(spelled))] if rules.gemma else scores
            pairs = derive_merges(vocab, order, spelled)
        unk = None if unknown is None else spelled[unknown]
        model = _bpe(vocab, pairs, byte_fallback=rules.byte_fallback, fuse_unk=True, unk=unk)
    return _document(
        model=model,
        added=_added_tokens(spelled, kinds, vocab),
        normalizer=rules.normalizer(),
        pre_tokenizer=rules.pre_tokenizer(),
        decoder=rules.decoder(),
        around=(_named(spelled, bos), _named(spelled, eos)),
    )


def _unigram(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], unknown: int | None, byte_fallback: bool
) -> dict[str, Any]:
    """Tokens that text must not be cut into are made too unlikely for it."""
    likely = [score if kind in (_NORMAL, _USER_DEFINED) else _NEVER for score, kind in zip(scores, kinds, strict=True)]
    vocab = [list(pair) for pair in zip(tokens, likely, strict=True)]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback}


def derive_merges(vocab: dict[str, int], scores: Sequence[float], tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, best token first: what BPE with these scores would merge."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = []
        for cut in range(1, len(token)):
            left = token[:cut]
            if left in vocab and (right := token[cut:]) in vocab:
                cuts.append((vocab[left], vocab[right], left, right))
        merges += [(score, len(left), len(right), left, right) for _, _, left, right in sorted(cuts)]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]


def merge_lines(merges: str) -> list[list[str]]:
    """The pairs of a merges.txt. Raises CheckpointError."""
    lines = [line.rstrip("\r") for line in merges.split("\n")]
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("merges.txt is damaged: a line is not a pair of tokens")
    return pairs


def _bpe(
    vocab: dict[str, int],
    merges: Iterable[Sequence[str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
    unk: str | None = None,
) -> dict[str, Any]:
    # The library refuses merges of unknown tokens; conversions leave some behind.
    known = [list(pair) for pair in merges if len(pair) == 2 and pair[0] in vocab and pair[1] in vocab]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": fuse_unk,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": [pair for pair in known if pair[0] + pair[1] in vocab],
    }


def _document(
    model: dict[str, Any],
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    around: Around,
) -> bytes:
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(*around),
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False).encode("utf-8", errors="replace")


def _named(tokens: Sequence[str], index: int | None) -> tuple[str, int] | None:
    return None if index is None else (tokens[index], index)


def post_processor(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any] | None:
    """What puts tokens before and after a text, and each of a pair of texts; None for nothing."""
    if bos is None and eos is None:
        return None

    def framed(sequence: str, kind: int) -> list[dict[str, Any]]:
        whole: list[dict[str, Any]] = [{"Sequence": {"id": sequence, "type_id": kind}}]
        before = [] if bos is None else [{"SpecialToken": {"id": bos[0], "type_id": kind}}]
        after = [] if eos is None else [{"SpecialToken": {"id": eos[0], "type_id": kind}}]
        return before + whole + after

    special = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in filter(None, (bos, eos))}
    single = framed("A", 0)
    return {"type": "TemplateProcessing", "single": single, "pair": single + framed("B", 1), "special_tokens": special}


def _added_tokens(tokens: Sequence[str], kinds: Sequence[int], vocab: dict[str, int]) -> list[dict[str, Any]]:
    return [
        _added(tokens[i], i, special=kind == _CONTROL)
        for i, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED) and tokens[i] and vocab.get(tokens[i]) == i
    ]


def _added(token: str, index: int, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": token, **flags, "special": special}


def _byte_vocab(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    """Token → id. Tokens that are not written in the byte alphabet are respelled, added tokens stay as they are."""
    spelling = byte_alphabet()
    letters = set(spelling)
    vocab = {}
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == _NORMAL and not letters.issuperset(token):
            token = "".join(spelling[byte] for byte in token.encode("utf-8"))
        vocab[token] = i
    return vocab


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """GPT-2's printable character of every byte: itself where it is printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256))
