"""The packs in the cache: which there are, what they are of, and taking them away."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flashrt.checkpoints.cache import PACKS, lock_file
from flashrt.errors import DiskError, PackError, UsageError
from flashrt.storage.lock import lock
from flashrt.storage.manifest import Manifest
from flashrt.storage.pack import is_pack, read_manifest

REMOVED = ".removed"  # ends the name of what is being deleted


@dataclass(frozen=True, slots=True)
class ShelvedPack:
    """A pack in the cache. `manifest` is None where it is not finished, or cannot be read; `problem` says which."""

    path: Path
    nbytes: int
    manifest: Manifest | None
    problem: str | None

    @property
    def name(self) -> str:
        """By which it is removed: that of its directory."""
        return self.path.name


def shelved_packs(cache: Path) -> list[ShelvedPack]:
    """All packs in the cache, unfinished and damaged ones included, by name. Raises DiskError."""
    folder = cache / PACKS
    try:
        return [_shelved(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.exists() else []
    except OSError as error:
        raise DiskError(f"{error.filename or folder} cannot be read: {error.strerror}") from None


def named(packs: Sequence[ShelvedPack], name: str) -> ShelvedPack:
    """The pack of that name or place, or the only one of that model. Raises UsageError where it is none or several."""
    path = Path(name).resolve()
    found = [pack for pack in packs if pack.name == name or pack.path.resolve() == path]
    found = found or [pack for pack in packs if name in _names_of(pack)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(pack.name for pack in found or packs) or "none"
    if found:
        raise UsageError(f"{name} may mean {len(found)} packs: name one of {shown}")
    raise UsageError(f"the cache holds no pack {name}; it holds {shown}")


def remove(pack: ShelvedPack) -> None:
    """Delete a pack; of a link to one, the link. Killed on the way, it leaves what is called so, to be removed again.

    Raises UsageError while a process makes it, DiskError where it cannot be deleted.
    """
    held, doomed = lock_file(pack.path), pack.path.with_name(pack.name.removesuffix(REMOVED) + REMOVED)
    try:
        with lock(held, busy=f"{pack.name} is being packed by another process"):
            if pack.path.is_symlink():
                pack.path.unlink()
            else:
                if doomed != pack.path and doomed.exists():
                    shutil.rmtree(doomed)
                pack.path.rename(doomed)  # at once: what is left of a pack would stand in the way of another
                shutil.rmtree(doomed)
            held.unlink()
    except OSError as error:
        raise DiskError(f"{error.filename or pack.path} cannot be deleted: {error.strerror or error}") from None


def _shelved(path: Path) -> ShelvedPack:
    manifest: Manifest | None = None
    problem: str | None = "unfinished: run it again, and it goes on"
    if path.name.endswith(REMOVED):
        problem = "removed in part: remove it again"
    elif is_pack(path):
        try:
            manifest, problem = read_manifest(path), None
        except PackError as error:
            problem = str(error)
    return ShelvedPack(path, sum(map(_taken, path.rglob("*"))), manifest, problem)


def _taken(file: Path) -> int:
    """Bytes on disk; 0 for what has gone by now, as temporary files of a process that packs do."""
    try:
        return file.stat().st_blocks * 512 if file.is_file() else 0
    except FileNotFoundError:
        return 0


def _names_of(pack: ShelvedPack) -> set[str]:
    """What else a pack is called: its model, and the repository or demo that it is of."""
    if pack.manifest is None:
        return set()
    where = pack.manifest.source.removeprefix("Hugging Face hub ")
    return {pack.manifest.name, where, where.partition(": ")[0]}
