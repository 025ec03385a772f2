"""The tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.text.bpe import SentencePieces, byte_level, sentencepiece
from flashrt.text.ends import end_ids
from flashrt.text.files import TextFiles
from flashrt.text.splits import Split, split_of

_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def text_from_gguf(metadata: Mapping[str, Any]) -> TextFiles:
    """Tokenizer, template and special tokens. Raises CheckpointError when the file has no (known) tokenizer."""
    fields = Metadata(metadata, "tokenizer.ggml.")
    model, tokens = fields.string("model"), fields.strings("tokens")
    if model is None or tokens is None:
        raise CheckpointError("the GGUF file holds no tokenizer")
    if model not in ("gpt2", "llama", "gemma4"):
        raise UnsupportedModelError(f"GGUF tokenizer {model!r} is not supported; known: gpt2, llama, gemma4")
    special = _special(fields, tokens)
    # Without the flag, llama.cpp adds BOS to SentencePiece vocabularies and to some byte-level ones.
    default_bos = model != "gpt2" or _split(fields).bos
    bos = _id(fields, "bos_token_id", tokens) if fields.flag("add_bos_token", default_bos) else None
    eos = _id(fields, "eos_token_id", tokens) if fields.flag("add_eos_token", False) else None
    values = Metadata(metadata)
    return TextFiles(
        _tokenizer(fields, tokens, (bos, eos), values.string("general.architecture", "")),
        values.string("tokenizer.chat_template"),
        special,
    )


def gguf_ends(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of tokens that end an answer, by their spelling and by the chat template. Empty without a tokenizer."""
    fields, values = Metadata(metadata, "tokenizer.ggml."), Metadata(metadata)
    tokens, kinds = fields.strings("tokens"), fields.integers("token_type")
    if tokens is None:
        return ()
    added = [t for t, kind in zip(tokens, kinds or (), strict=False) if kind in (_CONTROL, _USER_DEFINED) and t]
    ids = {token: i for i, token in enumerate(tokens)}
    return end_ids(ids, added, values.string("tokenizer.chat_template"), _special(fields, tokens))


def _special(fields: Metadata, tokens: list[str]) -> dict[str, str]:
    return {name: tokens[i] for name, key in _SPECIAL.items() if (i := _id(fields, key, tokens)) is not None}


def _split(fields: Metadata) -> Split:
    return split_of(fields.string("pre", "default"))


def _tokenizer(fields: Metadata, tokens: list[str], around: tuple[int | None, int | None], architecture: str) -> bytes:
    kinds = fields.integers("token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.token_type does not match the tokens")
    merges, (bos, eos) = fields.strings("merges"), around
    if fields.string("model") == "gpt2":
        if merges is None:
            raise CheckpointError("GGUF metadata: a gpt2 tokenizer without tokenizer.ggml.merges")
        return byte_level(tokens, merges, kinds, fields.string("pre", "default"), bos, eos)
    scores = fields.numbers("scores") or []
    if merges is None and fields.string("model") == "gemma4":
        raise CheckpointError("GGUF metadata: a gemma4 tokenizer without tokenizer.ggml.merges")
    if merges is None and len(scores) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.scores does not match the tokens")
    gemma = architecture.startswith("gemma")
    prefix = "prepend" if fields.flag("add_space_prefix", True) and not gemma else "never"
    rules = SentencePieces(prefix=prefix, gemma=gemma)
    return sentencepiece(tokens, scores, kinds, rules=rules, merges=merges, bos=bos, eos=eos)


def _id(fields: Metadata, key: str, tokens: list[str]) -> int | None:
    value = fields.integer(key)
    if value is not None and not 0 <= value < len(tokens):
        raise CheckpointError(f"GGUF metadata: tokenizer.ggml.{key} is {value}, beyond the {len(tokens)} tokens")
    return value
