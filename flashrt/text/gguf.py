"""The tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.text.bpe import byte_level, sentencepiece
from flashrt.text.files import TextFiles

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
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"GGUF tokenizer {model!r} is not supported; known: gpt2, llama")
    special = {name: tokens[i] for name, key in _SPECIAL.items() if (i := _id(fields, key, tokens)) is not None}
    # Without the flag, llama.cpp adds BOS to SentencePiece vocabularies and to Llama 3's.
    default_bos = model == "llama" or fields.string("pre") in ("llama3", "llama-v3", "llama-bpe")
    bos = _id(fields, "bos_token_id", tokens) if fields.flag("add_bos_token", default_bos) else None
    values = Metadata(metadata)
    return TextFiles(
        _tokenizer(fields, tokens, bos, values.string("general.architecture", "")),
        values.string("tokenizer.chat_template"),
        special,
    )


def _tokenizer(fields: Metadata, tokens: list[str], bos: int | None, architecture: str) -> bytes:
    kinds = fields.integers("token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.token_type does not match the tokens")
    merges = fields.strings("merges")
    if fields.string("model") == "gpt2":
        if merges is None:
            raise CheckpointError("GGUF metadata: a gpt2 tokenizer without tokenizer.ggml.merges")
        return byte_level(tokens, merges, kinds, fields.string("pre", "default"), bos)
    scores = fields.numbers("scores") or []
    if merges is None and len(scores) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.scores does not match the tokens")
    return sentencepiece(
        tokens,
        scores,
        kinds,
        merges=merges,
        prefix_space=fields.flag("add_space_prefix", True),
        gemma=architecture.startswith("gemma"),
        bos=bos,
    )


def _id(fields: Metadata, key: str, tokens: list[str]) -> int | None:
    value = fields.integer(key)
    if value is not None and not 0 <= value < len(tokens):
        raise CheckpointError(f"GGUF metadata: tokenizer.ggml.{key} is {value}, beyond the {len(tokens)} tokens")
    return value
