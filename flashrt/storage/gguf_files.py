"""GGUF files by their names: which of several is meant, and which parts belong to one that was split."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flashrt.errors import CheckpointError

SUFFIX = ".gguf"
MAX_PARTS = 10_000
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_PIECE = re.compile(r"(.*\.gguf)[-.](?:split|part)[-.]?\w+", re.IGNORECASE | re.DOTALL)
_BESIDE = ("mmproj", "imatrix")  # projectors of images, and statistics: no models
_SHOWN = 12


def part_of(name: str) -> tuple[str, int, int] | None:
    """(name before the number, which part from 1, how many) of NAME-00001-of-00003.gguf; None of another name."""
    found = _PART.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else None


def part_names(name: str) -> list[str]:
    """The names of all parts, given the name of one; `name` alone where it was not split."""
    part = part_of(name)
    if part is None:
        return [name]
    base, _, count = part
    return [f"{base}-{i:05d}-of-{count:05d}{SUFFIX}" for i in range(1, min(count, MAX_PARTS) + 1)]


def refuse_piece(path: Path) -> None:
    """Raises CheckpointError for a piece of a file that was cut without regard to its content."""
    if found := _PIECE.fullmatch(path.name):
        raise CheckpointError(
            f"{path} is a piece of {found[1]}, which was cut: join the pieces in their order "
            f"(cat {found[1]}?* > {found[1]}) and give the whole"
        )


def models_among(names: Iterable[str]) -> list[str]:
    """The GGUF models among file names, each by its first part."""
    found = [name for name in names if name.lower().endswith(SUFFIX)]
    found = [name for name in found if not any(word in Path(name).name.lower() for word in _BESIDE)]
    return sorted(name for name in found if (part_of(name) or ("", 1, 1))[1] == 1)


def pick(names: Iterable[str], tag: str | None, where: str) -> str:
    """The model that `tag` names ('Q4_K_M', say, or a file's name), or the only one. Raises CheckpointError."""
    models = models_among(names)
    fitting = [name for name in models if tag is None or _fits(name, tag)]
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(models[:_SHOWN]) + (f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else "")
    if not models:
        raise CheckpointError(f"{where} holds no GGUF file")
    if not fitting:
        raise CheckpointError(f"{where} holds no GGUF file of {tag!r}; it holds {shown}")
    raise CheckpointError(f"{where} holds {len(fitting)} GGUF files that may be meant: name one of them, of {shown}")


def only_gguf(directory: Path, tag: str | None = None) -> str | None:
    """The GGUF model that a directory holds, relative to it; None for a directory of safetensors.

    Raises CheckpointError where it holds several and `tag` does not tell which.
    """
    if tag is None and any(directory.glob("*.safetensors")):
        return None
    found = [str(path.relative_to(directory)) for pattern in ("*", "*/*") for path in directory.glob(pattern)]
    return pick(found, tag, str(directory)) if tag is not None or models_among(found) else None


def _fits(name: str, tag: str) -> bool:
    """Whether a file is called so, or its name ends so: Model-Q4_K_M.gguf is Q4_K_M."""
    last, tag = Path(name).name.lower(), tag.lower()
    part = part_of(last)
    stem = part[0] if part else last.removesuffix(SUFFIX)
    return tag in (last, stem) or re.search(rf"[-._]{re.escape(tag)}$", stem) is not None
