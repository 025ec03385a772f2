"""Tokens that lie beside tokenizer.json: those of tokenizer_config.json and its older companions, as transformers 5
adds them (`TokenizersBackend.__init__`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashrt.errors import CheckpointError
from flashrt.text.bpe import post_processor

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that have a name, in the order in which they are added."""
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that text is searched for before anything else is cut. `index`: the id that a file gives it."""

    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    index: int | None = None


def special_token(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def added_token(value: Any, what: str, *, special: bool | None = None, index: int | None = None) -> AddedToken:
    """An AddedToken of JSON: a text, or an object with `content` and flags. `special`: what it is said to be elsewhere.

    Raises CheckpointError naming `what`.
    """
    fields = {"content": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or not isinstance(fields.get("content"), str):
        raise CheckpointError(f"{what} is {value!r:.80}, expected a token")
    flags: dict[str, Any] = {name: fields[name] for name in _FLAGS if fields.get(name) is not None}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{what} is {value!r:.80}, expected flags that are true or false")
    if special is not None:
        flags["special"] = special
    is_special = flags.setdefault("special", False)
    flags.setdefault("normalized", not is_special)
    return AddedToken(str(fields["content"]), index=index, **flags)


def tokens_of(tokenizer: bytes) -> dict[str, AddedToken]:
    """The added tokens that a tokenizer.json holds itself, by content. Raises CheckpointError."""
    try:
        entries = json.loads(tokenizer).get("added_tokens") or []
        found = [added_token(entry, "a token of added_tokens", index=entry["id"]) for entry in entries]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"tokenizer.json is damaged: {error}") from error
    return {token.content: token for token in found}


def vocabulary(tokenizer: bytes) -> tuple[dict[str, int], list[str]]:
    """(id of every token, added tokens) of a tokenizer.json. Raises CheckpointError."""
    try:
        model = json.loads(tokenizer)["model"]["vocab"]
        if isinstance(model, dict):
            ids = {str(token): int(index) for token, index in model.items()}
        else:  # Unigram: pairs of token and score
            ids = {str(pair[0]): i for i, pair in enumerate(model)}
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise CheckpointError(f"tokenizer.json is damaged: {error}") from error
    added = tokens_of(tokenizer)
    ids |= {content: token.index for content, token in added.items() if token.index is not None}
    return ids, list(added)


def with_added(
    tokenizer: bytes, wanted: Sequence[AddedToken], *, bos: str | None = None, eos: str | None = None
) -> bytes:
    """tokenizer.json with further tokens, and with `bos` before and `eos` after every text where they are given.

    Raises CheckpointError where a token would get another id than a file gives it: transformers would then read text
    in another way than the file says.
    """
    known = tokens_of(tokenizer)
    fresh = [token for token in wanted if known.get(token.content) != _with_index(token, known)]
    if not fresh and bos is None and eos is None:
        return tokenizer
    from tokenizers import AddedToken as Entry

    backend = _backend(tokenizer)
    for token in fresh:
        flags = {name: getattr(token, name) for name in _FLAGS}
        backend.add_tokens([Entry(token.content, **flags)])
        found = backend.token_to_id(token.content)
        if token.index is not None and found != token.index:
            raise CheckpointError(
                f"the tokenizer's files contradict each other: {token.content!r} is added as token {token.index}, and "
                f"would be {found} after the vocabulary: correct its id"
            )
    document = json.loads(backend.to_str())
    if bos is not None or eos is not None:
        around = [None if name is None else (name, backend.token_to_id(name)) for name in (bos, eos)]
        document["post_processor"] = post_processor(*around)
    return json.dumps(document, ensure_ascii=False).encode("utf-8")


def _with_index(token: AddedToken, known: Mapping[str, AddedToken]) -> AddedToken:
    """`token` with the id that is known of it, where a file gives it none."""
    held = known.get(token.content)
    return replace(token, index=held.index) if token.index is None and held is not None else token


def _backend(tokenizer: bytes) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(tokenizer.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json cannot be used: {error}") from error
