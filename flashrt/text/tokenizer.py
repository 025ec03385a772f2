"""Text to token ids and back, on the tokenizers library alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrt.errors import CheckpointError, UsageError
from flashrt.text.files import SETTINGS, TOKENIZER, TextFiles, read_file
from flashrt.text.spelling import Spelling

if TYPE_CHECKING:
    from flashrt.text.template import ChatTemplate

REPLACEMENT = "\ufffd"
_CONTEXT = 8  # tokens before a stream that decide how its first token is spelled (a leading space or none)
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: what stands for bytes that are not UTF-8
_MAX_PENDING = 16  # a character takes at most four bytes: what is still unfinished after so many tokens is not UTF-8


class Tokenizer:
    """Wraps one tokenizer.json."""

    def __init__(self, backend: Any, text: TextFiles):
        """`backend` is a tokenizers.Tokenizer; `text` holds the settings around it. See the classmethods."""
        self._backend, self.text = backend, text
        self._backend.no_truncation()
        self._backend.no_padding()

    @classmethod
    def from_text(cls, text: TextFiles) -> Tokenizer:
        """From files in memory. Raises CheckpointError."""
        from tokenizers import Tokenizer as Backend

        # The library keeps a form of its own, several times as large as the file: do not keep that as well.
        return cls(_load(lambda: Backend.from_str(text.tokenizer.decode("utf-8"))), replace(text, tokenizer=b""))

    @classmethod
    def from_files(cls, directory: Path | str) -> Tokenizer:
        """From the files that `TextFiles.to_files` wrote (a pack's directory). Raises CheckpointError.

        The library reads the file itself: a large vocabulary in memory twice would set the smallest budget.
        """
        from tokenizers import Tokenizer as Backend

        directory = Path(directory)
        settings = TextFiles.from_bytes({TOKENIZER: b"", SETTINGS: read_file(directory / SETTINGS)})
        return cls(_load(lambda: Backend.from_file(str(directory / TOKENIZER))), settings)

    @property
    def vocab(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's template. Raises UsageError for a base model, which has none."""
        from flashrt.text.template import ChatTemplate

        return ChatTemplate.from_text(self.text)

    def token_id(self, token: str) -> int | None:
        """Id of one whole token, such as '<|im_end|>'."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special` adds what the model wants around a text (BOS); pass False for a rendered template,
        which names its own. Special tokens written out in the text are recognised either way.

        Raises UsageError for text that is not Unicode.
        """
        if found := _SURROGATE.search(text):
            raise UsageError(f"the text is not valid Unicode: character {found.start()} is U+{ord(found[0]):04X}")
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def encode_literal(self, text: str, first: bool) -> list[int]:
        """Token ids of text in which special tokens, written out, stay text. `first`: it begins a text.

        For one thread at a time, `encode` included. Raises UsageError for text that is not Unicode.
        """
        splitter = self._backend.pre_tokenizer
        prefix = getattr(splitter, "prepend_scheme", None)  # 'first' counts from where this text begins
        self._backend.encode_special_tokens = True
        if prefix == "first" and not first:
            splitter.prepend_scheme = "never"
        try:
            return self.encode(text, special=False)
        finally:
            self._backend.encode_special_tokens = False
            if prefix is not None:
                splitter.prepend_scheme = prefix

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The spellings that text is searched for, and that are special: those of control tokens."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special and token.content)

    def token_bytes(self, token: int) -> bytes:
        """What a token stands for, special ones included; see `Spelling`."""
        return self._spelling.bytes_of(token)

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._backend)

    @functools.cached_property
    def bos(self) -> int | None:
        """The token that `encode` puts before every text; None where it puts none."""
        ids = self.encode("")
        first = self.text.special_tokens.get("bos_token")
        return ids[0] if ids and first is not None and ids[0] == self.token_id(first) else None

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self, context: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """An incremental detokenizer. `context`: the tokens before it, when the text continues theirs."""
        return TextStream(self, context, skip_special)


def _load(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{TOKENIZER} cannot be used: {error}") from error


class TextStream:
    """Turns tokens into text as they come. A token may end within a character, and how a token is spelled may depend on
    the one before it; so a short window of tokens is decoded with and without the new ones, and the difference is
    given out once it ends on a whole character.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], skip_special: bool):
        self._tokenizer, self._skip = tokenizer, skip_special
        self._known = list(context[-_CONTEXT:])  # tokens whose text was given out
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Text that `token` completes; '' while a character is unfinished."""
        self._pending.append(token)
        return self._take(force=len(self._pending) > _MAX_PENDING)

    def flush(self) -> str:
        """What is left at the end; an unfinished character comes out as U+FFFD."""
        return self._take(force=True)

    def _take(self, force: bool) -> str:
        if not self._pending:
            return ""
        before = self._tokenizer.decode(self._known, self._skip)
        after = self._tokenizer.decode(self._known + self._pending, self._skip)
        if len(after) <= len(before) or (after.endswith(REPLACEMENT) and not force):
            if after == before and not force:
                self._absorb(before)
            return ""
        self._known, self._pending = self._pending, []
        return after[len(before) :]

    def _absorb(self, before: str) -> None:
        """Deal with tokens without text: special ones, or a leading space that decoding strips."""
        if not before:
            self._known = (self._known + self._pending)[-_CONTEXT:]  # what follows is not the first token any more
        self._pending = []
