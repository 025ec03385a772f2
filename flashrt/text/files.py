"""What turns text into tokens and back, as files: kept beside the weights of a pack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from flashrt.errors import CheckpointError

TOKENIZER = "tokenizer.json"
SETTINGS = "text.json"

GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample", "eos_token_id")

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "chat_template": ((str, NoneType), "a text or null"),
    "special_tokens": ((dict,), "an object"),
    "generation": ((dict,), "an object"),
}


@dataclass(frozen=True)
class TextFiles:
    """tokenizer: tokenizer.json, the tokenizers library's format
    chat_template: Jinja source, None for a base model
    special_tokens: what templates may name: bos_token, eos_token, unk_token, pad_token
    generation: defaults the model's authors recommend, as in generation_config.json
    """

    tokenizer: bytes = field(repr=False)
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)

    def to_files(self) -> dict[str, bytes]:
        """File name → content."""
        settings = {
            "chat_template": self.chat_template,
            "special_tokens": dict(self.special_tokens),
            "generation": dict(self.generation),
        }
        return {TOKENIZER: _compact(self.tokenizer), SETTINGS: json.dumps(settings, indent=1).encode()}

    @classmethod
    def from_files(cls, directory: Path) -> TextFiles:
        """Read what `to_files` wrote. Raises CheckpointError."""
        return cls.from_bytes({name: read_file(directory / name) for name in (TOKENIZER, SETTINGS)})

    @classmethod
    def from_bytes(cls, files: Mapping[str, bytes]) -> TextFiles:
        """The inverse of `to_files`. Raises CheckpointError."""
        try:
            settings = json.loads(files[SETTINGS])
            for key, (kinds, expected) in _KINDS.items():
                if not isinstance(settings[key], kinds):
                    raise TypeError(f"{key} is {settings[key]!r}, expected {expected}")
            if settings.get("add_bos"):  # of packs older than the rule that tokenizer.json alone says it
                raise CheckpointError(f"{SETTINGS} asks for a BOS token beside {TOKENIZER}: pack the checkpoint again")
            return cls(
                files[TOKENIZER],
                settings["chat_template"],
                {str(name): str(token) for name, token in settings["special_tokens"].items()},
                settings["generation"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{SETTINGS} is damaged: {error}") from error


def _compact(tokenizer: bytes) -> bytes:
    """The same JSON without indentation. Its size then tells what loading it will take (see `engine.build`)."""
    try:
        return json.dumps(json.loads(tokenizer), ensure_ascii=False, separators=(",", ":")).encode()
    except ValueError:
        return tokenizer  # damaged: left as it is for the library to name what is wrong


def read_file(path: Path) -> bytes:
    """The bytes of a file. Raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
