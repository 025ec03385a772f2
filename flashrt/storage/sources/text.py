"""The tokenizer, the chat template and the defaults of a Hugging Face directory, read as transformers 5 reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashrt.errors import CheckpointError
from flashrt.storage.sources.files import MAX_JSON, MAX_TOKENIZER, read_file, read_json
from flashrt.text.added import NAMED, AddedToken, added_token, special_token, tokens_of, with_added
from flashrt.text.bpe import byte_level_files, merge_lines
from flashrt.text.classes import CLASSES, TokenizerClass, class_name, split_of_class
from flashrt.text.files import GENERATION_KEYS, TextFiles
from flashrt.text.pieces import read_pieces
from flashrt.text.tekken import special_of, tekken_tokenizer

TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
PIECES, TEKKEN = "tokenizer.model", "tekken.json"
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEXT_FILES = (TOKENIZER, VOCAB, MERGES, PIECES, TEKKEN, CONFIG, SPECIAL, ADDED, "chat_template.j*")
"""Patterns of what a checkpoint's text lies in."""


def directory_text(directory: Path, model_type: str, generation: Mapping[str, Any]) -> TextFiles:
    """What lies in `directory`, for a model of this type. Raises CheckpointError, UnsupportedModelError."""
    try:
        return _Reader(directory, model_type).read(generation)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{directory} holds a template or merges that are not UTF-8 text: {error}") from error


@dataclass(frozen=True, slots=True)
class _Base:
    """A tokenizer.json before anything is added to it.

    special: named tokens where the configuration names none
    whole: it lies there as such, and says itself what is put around a text
    adds_bos: the beginning token is put before texts unless the configuration says otherwise
    """

    document: bytes
    special: Mapping[str, str]
    whole: bool = False
    adds_bos: bool = False


class _Reader:
    """One directory's files of text."""

    def __init__(self, directory: Path, model_type: str):
        self.directory = directory
        self.config = read_json(directory / CONFIG, required=False)
        named = self.config.get("tokenizer_class")
        if not isinstance(named, str | None):
            raise CheckpointError(f"{directory / CONFIG}: tokenizer_class is {named!r:.80}, expected a name")
        self.class_name = class_name(model_type, named)
        if "added_tokens_decoder" not in self.config:  # older files: the map then says what the special tokens are
            self.config |= read_json(directory / SPECIAL, required=False)

    def read(self, generation: Mapping[str, Any]) -> TextFiles:
        base = self._base()
        named = self._named(base.special)
        special = {name: token.content for name, token in named.items()}
        bos, eos = self._around(base, special)
        return TextFiles(
            with_added(base.document, self._wanted(base, named), bos=bos, eos=eos),
            _chat_template(self.directory, self.config),
            special,
            {key: generation[key] for key in GENERATION_KEYS if generation.get(key) is not None},
        )

    def _wanted(self, base: _Base, named: Mapping[str, AddedToken]) -> list[AddedToken]:
        """What is added to the base, in order: tokens with ids, then those that have none yet."""
        held = tokens_of(base.document)
        wanted = {token.content: token for token in self._added(held)}
        for token in (*named.values(), *self._extra()):
            if token.content not in wanted and token.content not in held:
                wanted[token.content] = token
        # What is named is special, whatever else the files that are read say of it: with added_tokens_decoder,
        # tokenizer.json's own tokens are not read again.
        read = wanted if "added_tokens_decoder" in self.config else held | wanted
        for token in named.values():
            known = read.get(token.content)
            if known is not None and not known.special:
                wanted[token.content] = replace(known, special=True)
        if CLASSES.get(self.class_name or "", TokenizerClass()).resets:
            for token in (*named.values(), *self._extra()):
                index = (wanted.get(token.content) or held[token.content]).index
                wanted[token.content] = replace(special_token(token.content), index=index)
        return list(wanted.values())

    def _base(self) -> _Base:
        here, brought = self.directory, CLASSES.get(self.class_name or "", TokenizerClass()).special
        if (here / TOKENIZER).exists():
            document = read_file(here / TOKENIZER, MAX_TOKENIZER)
            # Llama's class is not for byte-level vocabularies, whatever is named.
            of_llama = self.class_name == "LlamaTokenizer" and b'"ByteLevel"' in document
            return _Base(document, {} if of_llama else brought, whole=True)
        if (here / VOCAB).exists() and (here / MERGES).exists():
            return _Base(self._byte_level(), brought)
        if (here / TEKKEN).exists():
            tekken = read_json(here / TEKKEN, MAX_TOKENIZER)
            return _Base(tekken_tokenizer(tekken), special_of(tekken), adds_bos=True)
        if (here / PIECES).exists():
            pieces = read_pieces(read_file(here / PIECES, MAX_TOKENIZER))
            return _Base(pieces.tokenizer(self._prefix_scheme()), {**pieces.special, **brought})
        raise CheckpointError(
            f"{here} holds no tokenizer: expected {TOKENIZER}, {VOCAB} and {MERGES}, {PIECES} or {TEKKEN}"
        )

    def _byte_level(self) -> bytes:
        vocab = read_json(self.directory / VOCAB)
        if not all(type(index) is int for index in vocab.values()):
            raise CheckpointError(f"{self.directory / VOCAB} is damaged: not every token has a number")
        merges = merge_lines(read_file(self.directory / MERGES, MAX_JSON).decode("utf-8-sig"))
        split = split_of_class(self.class_name)
        return byte_level_files(vocab, merges, split, prefix_space=self._flag("add_prefix_space", False))

    def _prefix_scheme(self) -> str | None:
        """How a SentencePiece text is prefixed, where the class says it and not the vocabulary."""
        if not self._flag("add_prefix_space", True):
            return "never"
        if self.class_name != "LlamaTokenizer":
            return None
        return "always" if self._flag("legacy", False) else "first"

    def _flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.directory}: {key} is {value!r:.80}, expected true or false")
        return value

    def _around(self, base: _Base, special: Mapping[str, str]) -> tuple[str | None, str | None]:
        """Tokens before and after every text. A post-processor of tokenizer.json stands, whatever is said beside it."""
        if base.whole:
            return None, None
        bos = special.get("bos_token") if self._flag("add_bos_token", base.adds_bos) else None
        return bos, special.get("eos_token") if self._flag("add_eos_token", False) else None

    def _added(self, held: Mapping[str, AddedToken]) -> list[AddedToken]:
        """Tokens with ids: of added_tokens_decoder, or of the older added_tokens.json."""
        decoder = self.config.get("added_tokens_decoder")
        if decoder is None:
            return self._added_before(held)
        if not isinstance(decoder, dict) or not all(key.isdecimal() and len(key) < 10 for key in decoder):
            raise CheckpointError(
                f"{self.directory / CONFIG}: added_tokens_decoder is {decoder!r:.80}, expected tokens"
            )
        found = [added_token(value, f"added token {key}", index=int(key)) for key, value in decoder.items()]
        return sorted(found, key=lambda token: token.index or 0)

    def _added_before(self, held: Mapping[str, AddedToken]) -> list[AddedToken]:
        tokens = read_json(self.directory / ADDED, required=False)
        if not all(type(index) is int and index >= 0 for index in tokens.values()):
            raise CheckpointError(f"{self.directory / ADDED} is damaged: not every token has a number")
        special = {token.content for token in (*self._named({}).values(), *self._extra())}
        return [
            added_token(content, ADDED, special=content in special, index=index)
            for content, index in sorted(tokens.items(), key=lambda item: item[1])
            if content not in held
        ]

    def _named(self, brought: Mapping[str, str]) -> dict[str, AddedToken]:
        """bos_token and the like; what the files do not name is `brought` along."""
        result = {}
        for name in NAMED:
            value = self.config[name] if name in self.config else brought.get(name)
            if value is not None and value is not False:
                result[name] = added_token(value, f"{self.directory}: {name}", special=True)
        return result

    def _extra(self) -> list[AddedToken]:
        """Special tokens without a name."""
        value = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        entries = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(entries, list):
            raise CheckpointError(f"{self.directory}: additional_special_tokens is {value!r:.80}, expected tokens")
        extra = [added_token(entry, "a token of additional_special_tokens", special=True) for entry in entries]
        own = [
            special_token(value)
            for key, value in self.config.items()
            if key.endswith("_token") and key not in NAMED and isinstance(value, str)
        ]
        return [*extra, *own]


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_file(path, MAX_JSON).decode()
    found = config.get("chat_template")
    if found is None:
        found = read_json(directory / "chat_template.json", required=False).get("chat_template")
    if isinstance(found, dict):  # several named templates
        found = found.get("default")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    if not isinstance(found, str | None):
        raise CheckpointError(f"{directory}: chat_template is {found!r:.80}, expected a text")
    return found
