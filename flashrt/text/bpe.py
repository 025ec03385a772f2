"""tokenizer.json from the pieces other formats keep: a vocabulary, merges or scores, token types.

Byte-level BPE (GPT-2's and its descendants', which differ in how they split text) and SentencePiece-like BPE (spaces as
U+2581, unknown characters as byte tokens).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

from flashrt.errors import CheckpointError, UnsupportedModelError

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# How byte-level vocabularies split text before merging, by the name in `tokenizer.ggml.pre`; None is GPT-2's own.
_SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "gpt2": None,
    "default": None,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
# Whole words are looked up before merging: their vocabularies hold words that merges do not reach.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")


def byte_level(
    tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int], split: str, bos: int | None = None
) -> bytes:
    """tokenizer.json of a byte-level BPE. `bos`: the id put before every text, None for none."""
    if split not in _SPLITS:
        known = ", ".join(sorted(_SPLITS))
        raise UnsupportedModelError(f"GGUF pre-tokenizer {split!r} is not supported; known: {known}")
    pattern = _SPLITS[split]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    pre: dict[str, Any] = level
    if pattern is not None:
        isolated = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        pre = {"type": "Sequence", "pretokenizers": [isolated, level]}
    vocab = _byte_vocab(tokens, kinds)
    return _document(
        model=_bpe(vocab, (merge.split(" ", 1) for merge in merges), ignore_merges=split in _WHOLE_WORDS),
        added=_added_tokens(tokens, kinds, vocab),
        normalizer={"type": "NFC"} if _SPLITS[split] == _QWEN2 else None,
        pre_tokenizer=pre,
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        bos=None if bos is None else (tokens[bos], bos),
    )


def sentencepiece(
    tokens: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    merges: Sequence[str] | None = None,
    prefix_space: bool = True,
    gemma: bool = False,
    bos: int | None = None,
) -> bytes:
    """tokenizer.json of a SentencePiece BPE vocabulary.

    gemma: runs of spaces are tokens spelled with spaces, and merges follow the vocabulary's order, not its scores
    """
    spelled = [SPACE * len(token) if gemma and token and not token.strip(" ") else token for token in tokens]
    vocab = {token: i for i, token in enumerate(spelled)}
    pairs: Iterable[Sequence[str]]
    if merges is not None:
        pairs = (merge.split(" ", 1) for merge in merges)
    else:
        pairs = derive_merges(vocab, [-float(i) for i in range(len(spelled))] if gemma else scores, spelled)
    unknown = next((i for i, kind in enumerate(kinds) if kind == _UNKNOWN), None)
    model = _bpe(vocab, pairs, byte_fallback=True, fuse_unk=True, unk=None if unknown is None else spelled[unknown])
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if prefix_space and not gemma:
        # As in Llama 2's own tokenizer.json, and in llama.cpp: also before text that starts with a space.
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _document(
        model=model,
        added=_added_tokens(spelled, kinds, vocab),
        normalizer={"type": "Sequence", "normalizers": steps},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        bos=None if bos is None else (spelled[bos], bos),
    )


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


def gpt2_files(vocab: dict[str, int], merges: str, special: dict[str, int]) -> bytes:
    """tokenizer.json from GPT-2's vocab.json and merges.txt (OPT's checkpoints have nothing else)."""
    pairs = [line.split(" ", 1) for line in merges.splitlines() if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError("merges.txt is damaged: a line is not a pair of tokens")
    added = [_added(token, i, special=True) for token, i in sorted(special.items(), key=lambda item: item[1])]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _document(_bpe(vocab, pairs), added, None, level, level, None)


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
    bos: tuple[str, int] | None,
) -> bytes:
    post = None
    if bos is not None:
        token, index = bos
        start = {"SpecialToken": {"id": token, "type_id": 0}}
        post = {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": token, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
        }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(document, ensure_ascii=False).encode("utf-8", errors="replace")


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
