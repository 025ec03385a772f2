"""Packing that moves: each file of a checkpoint is deleted once all that was packed from it is on disk.

Whenever the process is killed, what is not in finished files of the pack is still in files of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from flashrt.errors import UsageError
from flashrt.storage.atomic import disk_errors, sync_directory
from flashrt.storage.layout import RESIDENT_FILE, layer_file
from flashrt.storage.sources.checkpoint import Checkpoint
from flashrt.storage.sources.moved import RECORD, save


class Move:
    """Of `source`, opened at `where`, into the directory `out`. Raises UsageError for files that are links."""

    def __init__(self, source: Checkpoint, where: Path, out: Path) -> None:
        self._source, self._where, self._out = source, where, out
        self._users: dict[Path, set[str]] = {path: set() for path in sorted(source.reader.paths)}
        for layer in (None, *range(len(source.spec.layers))):
            for path in source.files_behind(layer):
                self._users[path].add(RESIDENT_FILE if layer is None else layer_file(layer))
        for path in self._users:
            if path.is_symlink():
                raise UsageError(
                    f"{path} is a link, and deleting it would free nothing: name the checkpoint where its files lie, "
                    "or leave out --delete-source"
                )

    def most(self, file_bytes: Mapping[str, int], finished: Collection[str]) -> int:
        """Bytes that the disk of the pack must have free: what is written at most before room is given back."""
        written, most, done = 0, 0, set(finished)
        left = {path: path.stat().st_size for path in self._users if self._gives_room(path)}
        for file in (file for file in file_bytes if file not in done):
            written += file_bytes[file]
            most = max(most, written)
            done.add(file)
            for path in [path for path in left if self._released(path, done)]:
                written -= left.pop(path)
        return most

    def release(self, finished: Collection[str]) -> None:
        """Delete the files from which nothing has to be packed any more; `finished` are the pack's finished files."""
        self._delete([path for path in self._users if self._released(path, finished)])

    def finish(self) -> None:
        """The pack is complete: delete all that is left, files that only hold tensors which nobody reads included."""
        self._delete(list(self._users))

    def over(self) -> None:
        """Forget what is needed for going on."""
        (self._out / RECORD).unlink(missing_ok=True)

    def _released(self, path: Path, finished: Collection[str]) -> bool:
        # One that nothing is packed from waits for the end, as does the only one: it may be all that names the model.
        return 0 < len(self._users[path]) <= len(finished) and len(self._users) > 1 and self._users[path] <= {*finished}

    def _gives_room(self, path: Path) -> bool:
        return path.exists() and path.stat().st_dev == self._out.stat().st_dev

    def _delete(self, paths: list[Path]) -> None:
        paths = [path for path in paths if path.exists()]
        if not paths:
            return
        if not (self._out / RECORD).exists():
            save(self._source, self._where, self._out)
        for path in paths:
            self._source.reader.close_file(path)  # an open file keeps its room
            with disk_errors(path.parent):
                path.unlink()
                sync_directory(path.parent)
