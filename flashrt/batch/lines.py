"""Requests of a file, one a line: JSON objects in OpenAI's batch format, or plain prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashrt.errors import UsageError

JSON_SUFFIX = ".jsonl"  # what else there is holds prompts
LEAST_LINE = 1 << 20  # bytes of a line that are read in any case
TOKEN_BYTES = 16  # of a line, a token of context


@dataclass(frozen=True, slots=True)
class Line:
    """One that is not empty. `data`: None for one that is too long, of which `key` knows the beginning only."""

    number: int  # from 1 on
    key: str  # of its bytes: two lines have the same one if they say the same
    data: bytes | None


def longest_line(context: int) -> int:
    """Bytes."""
    return max(LEAST_LINE, TOKEN_BYTES * context)


def lines(path: Path, longest: int) -> Iterator[Line]:
    """The lines of a file that are not empty, each of `longest` bytes at most. Raises UsageError."""
    try:
        with path.open("rb") as handle:
            number = 0
            while data := handle.readline(longest + 1):
                number, whole = number + 1, data.strip()
                key = hashlib.blake2b(whole, digest_size=12).hexdigest()
                too_long = len(data) > longest and not data.endswith(b"\n")
                while too_long and data and not data.endswith(b"\n"):
                    data = handle.readline(longest)
                if whole:
                    yield Line(number, key, None if too_long else whole)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
