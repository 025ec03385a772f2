"""Text to train a small model on: what is installed on any machine, cleaned of repetitions and split by file."""

from __future__ import annotations

import gzip
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".py", ".md", ".rst", ".txt")
NAMES = ("README", "NEWS", "copyright")  # documentation without a suffix
FEWEST_BYTES = 200  # of a document, once what was met before is gone
MOST_BYTES = 1 << 20  # of a file: longer ones are mostly tables
HELD_OUT_BYTES, CALIBRATION_BYTES = 256 << 10, 1 << 20  # at most, and a tenth of the whole each
BETWEEN = "\n\n\n"  # documents of a text file


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents for training, for calibration of what is fitted to the trained model, and for evaluation."""

    train: list[str]
    calibration: list[str]
    held_out: list[str]


def default_roots() -> list[Path]:
    """Where sources and documentation are found: Python's library, installed packages, the system's documentation."""
    paths = sysconfig.get_paths()
    return [Path(paths["stdlib"]), Path(paths["purelib"]), Path("/usr/share/doc")]


def collect(roots: Sequence[Path], limit: int) -> Corpus:
    """Up to `limit` bytes of text below `roots`, the same whenever the files are the same.

    Files are taken in the order of a hash of their paths, so that a limit takes of everything; the first are held out.
    A paragraph is used once, where it is met first: what is held out is therefore not in the training text again, as
    licences and copied functions would be. Raises SystemExit when there is too little text.
    """
    documents = list(_until(_documents(roots), limit))
    size = sum(map(_size, documents))
    if size < 10 * FEWEST_BYTES:
        raise SystemExit(f"{', '.join(map(str, roots))}: {size} bytes of text are too few to train on")
    pending = iter(documents)
    held_out = list(_until(pending, min(HELD_OUT_BYTES, size // 10)))
    calibration = list(_until(pending, min(CALIBRATION_BYTES, size // 10)))
    return Corpus(list(pending), calibration, held_out)


def _until(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Documents up to and including the one that reaches `limit` bytes."""
    taken = 0
    for document in documents:
        yield document
        taken += _size(document)
        if taken >= limit:
            return


def _size(document: str) -> int:
    return len(document.encode())


def _documents(roots: Sequence[Path]) -> Iterator[str]:
    seen: set[bytes] = set()
    for path in _files(roots):
        text = _unseen(_read(path), seen)
        if _size(text) >= FEWEST_BYTES:
            yield text


def _files(roots: Sequence[Path]) -> list[Path]:
    """The files that look like text, shuffled by their names."""
    found = {}
    for root in roots:
        for path in root.rglob("*"):
            if _is_text(path.name) and path.is_file():
                found[path.resolve()] = _digest(str(path.relative_to(root)))
    return sorted(found, key=lambda path: (found[path], path))


def _is_text(name: str) -> bool:
    plain = name.removesuffix(".gz")
    return plain.endswith(SUFFIXES) or plain in NAMES


def _read(path: Path) -> str:
    """The text of a file, perhaps compressed; empty when it is none, or too long."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return ""
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").replace("\r\n", "\n")
    except (OSError, ValueError, EOFError):
        return ""


def _unseen(text: str, seen: set[bytes]) -> str:
    """The paragraphs of a text that are not in `seen`, which takes them in."""
    fresh = []
    for paragraph in text.split("\n\n"):
        digest = _digest(" ".join(paragraph.split()))
        if digest not in seen:
            seen.add(digest)
            fresh.append(paragraph)
    return "\n\n".join(fresh)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
