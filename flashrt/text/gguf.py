"""The tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    prefix = "tokenizer.ggml."
    fields = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    model = fields.get("model")
    if model is None or "tokens" not in fields:
        raise CheckpointError("the GGUF file holds no tokenizer")
    if model not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"GGUF tokenizer {model!r} is not supported; known: gpt2, llama")
    tokens = _strings(fields, "tokens")
    special = {name: tokens[i] for name, key in _SPECIAL.items() if (i := _id(fields, key, tokens)) is not None}
    # Without the flag, llama.cpp adds BOS to SentencePiece vocabularies and to Llama 3's.
    default_bos = model == "llama" or fields.get("pre") in ("llama3", "llama-v3", "llama-bpe")
    bos = _id(fields, "bos_token_id", tokens) if fields.get("add_bos_token", default_bos) else None
    template = metadata.get("tokenizer.chat_template")
    return TextFiles(
        _tokenizer(fields, tokens, bos, str(metadata.get("general.architecture"))),
        template if isinstance(template, str) else None,
        special,
    )


def _tokenizer(fields: Mapping[str, Any], tokens: list[str], bos: int | None, architecture: str) -> bytes:
    kinds = fields.get("token_type") or [1] * len(tokens)
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.token_type does not match the tokens")
    merges = _strings(fields, "merges") if "merges" in fields else None
    if fields["model"] == "gpt2":
        if merges is None:
            raise CheckpointError("GGUF metadata: a gpt2 tokenizer without tokenizer.ggml.merges")
        return byte_level(tokens, merges, kinds, str(fields.get("pre", "default")), bos)
    scores = fields.get("scores") or []
    if merges is None and len(scores) != len(tokens):
        raise CheckpointError("GGUF metadata: tokenizer.ggml.scores does not match the tokens")
    return sentencepiece(
        tokens,
        scores,
        kinds,
        merges=merges,
        prefix_space=bool(fields.get("add_space_prefix", True)),
        gemma=architecture.startswith("gemma"),
        bos=bos,
    )


def _strings(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"GGUF metadata: tokenizer.ggml.{key} is not a list of strings")
    return value


def _id(fields: Mapping[str, Any], key: str, tokens: list[str]) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(tokens):
        raise CheckpointError(f"GGUF metadata: tokenizer.ggml.{key} is {value!r}, beyond the {len(tokens)} tokens")
    return value
