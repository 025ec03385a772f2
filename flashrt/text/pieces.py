"""tokenizer.model: a SentencePiece vocabulary with its own rules of normalization, as tokenizer.json.

Source: sentencepiece_model.proto, and what the sentencepiece library does with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.text.bpe import SentencePieces, sentencepiece
from flashrt.text.wire import Value, fields, signed

_UNIGRAM, _BPE = 1, 2
_MODELS = {_UNIGRAM: "unigram", _BPE: "bpe", 3: "word", 4: "char"}
MAX_PIECES = 1 << 22


@dataclass(frozen=True)
class Pieces:
    """One vocabulary.

    pieces, scores, kinds: of every token; kinds as GGUF files number them: 1 normal, 2 unknown, 3 control, 4 defined by
    a user, 5 unused, 6 byte
    charsmap: the compiled rules that characters are replaced by; empty for none
    dummy_prefix: a space is put before every text
    squeeze: runs of spaces become one, those at the ends of a text none
    special: bos_token, eos_token and unk_token, those that there are
    """

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    unigram: bool
    byte_fallback: bool
    charsmap: bytes
    dummy_prefix: bool
    squeeze: bool
    special: dict[str, str]

    def tokenizer(self, prefix_scheme: str | None = None) -> bytes:
        """tokenizer.json. `prefix_scheme`: 'first' or 'always' as transformers' Llama class prefixes a text, 'never',
        or None for what the vocabulary itself says.
        """
        rules = SentencePieces(
            prefix=prefix_scheme or ("prepend" if self.dummy_prefix else "never"),
            unigram=self.unigram,
            byte_fallback=self.byte_fallback,
            charsmap=self.charsmap,
            squeeze=self.squeeze,
        )
        return sentencepiece(self.pieces, self.scores, self.kinds, rules=rules)


def read_pieces(data: bytes) -> Pieces:
    """A tokenizer.model. Raises CheckpointError when it is damaged, UnsupportedModelError for rules unknown here."""
    if data.split(b"\n", 1)[0].count(b" ") == 1 and data[:1].isalnum():
        raise UnsupportedModelError(
            "tokenizer.model is a list of tokens as tiktoken keeps them, which is not supported: load the tokenizer "
            "with transformers and save it, which writes tokenizer.json"
        )
    try:
        return _read(data)
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"tokenizer.model is damaged: {error}") from error


def _read(data: bytes) -> Pieces:
    tokens: list[tuple[str, float, int]] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is {value!r}, expected a message")
        if number == 1 and isinstance(value, bytes):
            if len(tokens) == MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES} pieces")
            tokens.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(fields(value))
    if not tokens:
        raise ValueError("it holds no pieces")
    kind = signed(trainer.get(3, _UNIGRAM))
    charsmap = normalizer.get(2, b"")
    if not isinstance(charsmap, bytes):
        raise ValueError("its rules of characters are no bytes")
    suffixes, plain_spaces = bool(trainer.get(24, 0)), not normalizer.get(5, 1)
    if kind not in (_UNIGRAM, _BPE) or suffixes or plain_spaces:
        spaces = "behind words" if suffixes else "as they are" if plain_spaces else "before words"
        raise UnsupportedModelError(
            f"tokenizer.model is a SentencePiece vocabulary of type {_MODELS.get(kind, kind)!r} with spaces {spaces}, "
            "which is not supported; supported: bpe and unigram, with spaces before words"
        )
    pieces, scores, kinds = map(list, zip(*tokens, strict=True))
    return Pieces(
        pieces,
        scores,
        kinds,
        unigram=kind == _UNIGRAM,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=charsmap,
        dummy_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        special={name: pieces[i] for name, i in _named_ids(trainer) if 0 <= i < len(pieces)},
    )


def _named_ids(trainer: dict[int, Value]) -> list[tuple[str, int]]:
    ids = (("unk_token", 40, 0), ("bos_token", 41, 1), ("eos_token", 42, 2))
    return [(name, signed(trainer.get(number, default))) for name, number, default in ids]


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3:
            kind = signed(value)
    return text, score, kind
