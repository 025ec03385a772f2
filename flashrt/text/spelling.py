"""The bytes that a token stands for, which need not be whole characters."""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


class Spelling:
    """Of a tokenizers.Tokenizer: byte-level, or SentencePiece's with single bytes beside its pieces."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        steps = decoder.get("decoders", [decoder])
        kinds = {step.get("type") for step in steps}
        self._bytes = _byte_letters() if "ByteLevel" in kinds else None
        self._single = "ByteFallback" in kinds
        self._spaces = "Metaspace" in kinds or _SPACE in json.dumps(steps, ensure_ascii=False)
        self._added = {int(index): token.content for index, token in backend.get_added_tokens_decoder().items()}

    def bytes_of(self, token: int) -> bytes:
        """b'' for an id that stands for nothing."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token) or ""
        if self._bytes is not None:
            known = self._bytes
            return b"".join(bytes([known[letter]]) if letter in known else letter.encode() for letter in piece)
        if self._single and (found := _BYTE.fullmatch(piece)):
            return bytes.fromhex(found[1])
        return (piece.replace(_SPACE, " ") if self._spaces else piece).encode()


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2; Radford et al. 2019): its own if printable."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}
