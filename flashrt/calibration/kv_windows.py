"""The text of a calibration of attention: short pieces to fit labels to, and long ones held out.

What is left out costs nothing where every row attends to all that it sees, as rows of short texts do. So errors and
losses are those of long texts; what labels are fitted to is of several kinds rather than long.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flashrt.calibration.windows import Windows, check_enough, spread, written
from flashrt.config import whole
from flashrt.engine.engine import Engine
from flashrt.storage.atomic import write_atomically
from flashrt.text.tokenizer import Tokenizer

FITTED, HELD_OUT = 2048, 8192  # tokens of a piece, or the model's context
FITTED_PIECES = 4  # where no number of tokens is given
LIBRARY = ("argparse", "difflib", "tarfile", "statistics")  # modules of Python's library that are long and unlike
SOURCE = Path(__file__).parents[1]
SHARE = 3  # one of so many tokens is held out, one piece at least


@dataclass(frozen=True, slots=True)
class KvText:
    """Pieces of text to fit to, and pieces held out."""

    fitted: Windows
    held_out: Windows


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many pieces there are of which length."""

    fitted: int  # tokens of a piece
    held_out: int
    fitted_pieces: int
    held_out_pieces: int

    @classmethod
    def of(cls, context: int, tokens: int | None) -> Lengths:
        """For a model of this context, and so many tokens of text. Raises UsageError for too few."""
        fitted, held_out = min(FITTED, context), min(HELD_OUT, context)
        usual = FITTED_PIECES * fitted + held_out
        tokens = whole("tokens", usual if tokens is None else tokens, fitted + held_out)
        pieces = max(tokens // SHARE // held_out, 1)
        return cls(fitted, held_out, (tokens - pieces * held_out) // fitted, pieces)

    def cut(self, tokenizer: Tokenizer, text: str) -> KvText:
        """Pieces of a text: those held out are its end. Raises UsageError for too short a text."""
        ids, prefix = tokenizer.encode(text, special=False), tokenizer.encode("")
        fitted, held_out = self.fitted - len(prefix), self.held_out - len(prefix)
        check_enough(len(ids), fitted + held_out)
        pieces = min(self.held_out_pieces, max(len(ids) // SHARE // held_out, 1))
        end = len(ids) - pieces * held_out
        return KvText(
            spread(ids[:end], prefix, self.fitted, self.fitted_pieces),
            spread(ids[end:], prefix, self.held_out, pieces),
        )

    def write(self, engine: Engine, path: Path, progress: Callable[[int, int], None]) -> KvText:
        """Pieces that the model writes itself, each of its own subject, and as many of Python's library, in turn.

        Labels that were fitted to what the model writes alone erred by 28% more on code. Held out is this program's
        source: the model would take long to write long texts, and goes round in circles there. What is in the file
        `path` already is kept.
        """
        pieces: Windows = json.loads(path.read_bytes()) if path.exists() else []
        while len(pieces) < self.fitted_pieces:
            before = len(pieces) * self.fitted

            def report(done: int, before: int = before) -> None:
                progress(before + done, self.fitted * self.fitted_pieces)

            piece = _of_library(engine.tokenizer, len(pieces) // 2, self.fitted) if len(pieces) % 2 else None
            pieces.append(piece or written(engine, len(pieces), self.fitted, report))
            write_atomically(path, json.dumps(pieces).encode())
        if len(pieces) == self.fitted_pieces:
            pieces += self._source(engine.tokenizer)
            write_atomically(path, json.dumps(pieces).encode())
        return KvText(pieces[: self.fitted_pieces], pieces[self.fitted_pieces :])

    def _source(self, tokenizer: Tokenizer) -> Windows:
        """Pieces of the program's source."""
        ids, prefix = list[int](), tokenizer.encode("")
        needed = self.held_out_pieces * (self.held_out - len(prefix))
        for path in sorted(SOURCE.rglob("*.py")):
            if len(ids) < needed:
                ids += tokenizer.encode(path.read_text(encoding="utf-8"), special=False)
        check_enough(len(ids), self.held_out)
        return spread(ids[:needed], prefix, self.held_out, self.held_out_pieces)


def _of_library(tokenizer: Tokenizer, number: int, length: int) -> list[int] | None:
    """The beginning of a module of Python's library; None where its source is missing or too short."""
    found = importlib.util.find_spec(LIBRARY[number % len(LIBRARY)])
    path = None if found is None or found.origin is None else Path(found.origin)
    if path is None or path.suffix != ".py" or not path.exists():
        return None
    ids = tokenizer.encode(path.read_text(encoding="utf-8"))[:length]
    return ids if len(ids) == length else None
