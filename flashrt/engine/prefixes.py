"""Beginnings of texts, kept in a directory across processes: a file for each segment of 256 positions.

The files form a tree. One is named after a hash of the tokens before it and a hash of those up to its end, so what may
follow a file is found by name; whether it does, its tokens say. Texts that begin alike share files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashrt.config import GIB
from flashrt.engine.sequence import Sequence
from flashrt.engine.sessions import Sessions, beginning, common
from flashrt.errors import DiskError, SessionError, SessionWarning, UsageError
from flashrt.kv.cache import KvCache
from flashrt.kv.pages import Extent
from flashrt.kv.reach import needed
from flashrt.storage.lock import lock
from flashrt.storage.session_file import VERSION, SessionFile, session_bytes
from flashrt_kernels.limits import ATTENTION_SEGMENT

SUFFIX = ".kv"
LOCK = "lock"
KEY_DIGITS = 32

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Link:
    """A file whose tokens are those of a text up to `length`. Its keys and values stand from position `begin` on.

    It has `whole` tokens, and was saved by a sequence that has had `top`: of a layer that sees a window, it may hold
    nothing. Of recurrent layers it holds `states`, after so many tokens each.
    """

    path: Path
    begin: int
    length: int
    whole: int
    top: int
    states: tuple[int, ...]

    def serves(self, window: int | None, top: int) -> bool:
        """Whether it holds what such a layer needs of it in a sequence that has had `top` tokens."""
        return not needed(window, top) <= self.begin < needed(window, self.top)


class Prefixes:
    """The directory `folder`, which may take `limit` bytes. Processes may share it.

    Who saves holds its lock. Who reads does not: files are there whole or not at all, and one that vanishes is one that
    was not found. What is damaged is removed, with a SessionWarning.
    """

    def __init__(self, folder: Path, limit: int, sessions: Sessions) -> None:
        """Raises UsageError where nothing can be kept there."""
        self._folder, self._limit, self._sessions = folder, limit, sessions
        form = sessions.form
        self._seed = hashlib.sha256(json.dumps([VERSION, form.pack, form.shapes]).encode())
        self._windows = {attention.window for attention in form.spec.attentions.values()}
        self._dropped: set[Path] = set()  # not to be opened again, should they not let themselves be removed
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder / LOCK).close()
        except OSError as error:
            raise UsageError(f"no sessions can be kept in {folder}: {error.strerror}") from None

    def resume(self, sequence: Sequence, prompt: Items[int]) -> None:
        """Make `sequence` hold the longest beginning of `prompt` that is kept, where it holds a shorter one."""
        tokens = beginning(prompt)
        while True:
            links = self._chain(tokens)
            length, top = self._reach(links, sequence.kv)
            if length <= sequence.length:
                return
            used = [link for link in links if link.begin < length]
            opened: list[Path] = []
            try:
                self._sessions.restore(sequence, self._open_all(used, opened), tokens[:length], top)
            except (SessionError, DiskError) as error:
                self._drop(opened[-1], error)
            else:
                _touch([link.path for link in used])
                return

    def save(self, sequence: Sequence) -> None:
        """Keep what `sequence` holds; to make room, what was used least recently goes.

        A SessionWarning says what cannot be kept.
        """
        try:
            with lock(self._folder / LOCK):
                self._save(sequence)
        except (OSError, DiskError) as error:
            _warn(f"this session is not kept: {error}")

    def _save(self, sequence: Sequence) -> None:
        """Holds the lock."""
        for left in self._folder.glob("*.tmp"):  # of a process that was killed: whoever writes holds the lock
            left.unlink(missing_ok=True)
        tokens, kv = np.array(sequence.tokens, np.int32), sequence.kv
        held = {link.begin: link for link in self._chain(tokens)}
        paths: list[Path] = []
        new: dict[Path, Extent] = {}
        held_marks = kv.marks()
        for begin, length, path in self._files(tokens):
            link, marks = held.get(begin), [mark for mark in held_marks if begin < mark <= length]
            extent = Extent(begin, length, kv.top, tuple(marks), bool(kv.recurrent) and length == kv.length)
            if link and self._holds(link, extent):
                paths.append(link.path)
            else:
                paths.append(path)
                new[path] = extent
        self._make_room(paths, new)
        for path, extent in new.items():
            self._sessions.save(sequence, path, extent)
            self._dropped.discard(path)
            link = held.get(extent.begin)
            if link and link.path != path and link.length == link.whole:  # the new file begins with its tokens
                link.path.unlink(missing_ok=True)
        _touch([path for path in paths if path.exists()])

    def _holds(self, link: Link, extent: Extent) -> bool:
        """Whether a file need not be written again for an extent."""
        serves = all(link.serves(window, extent.top) for window in self._windows)
        return link.length == extent.length and serves and set(extent.states) <= set(link.states)

    def _make_room(self, paths: Items[Path], new: dict[Path, Extent]) -> None:
        """Remove what was used least recently until `new` fits, and of `new` what does not fit at all.

        paths: what stays, as far as the limit allows
        """
        sizes = {path: session_bytes(self._sessions.form, extent) for path, extent in new.items()}
        files = {path: path.stat() for path in self._folder.glob(f"*{SUFFIX}") if path not in new}
        stay = sum(files[path].st_size for path in paths if path in files)
        if stay + sum(sizes.values()) > self._limit:
            _warn(f"this session is kept in part: it does not fit in {self._limit / GIB:g} GiB (--session-gb)")
        while new and stay + sum(sizes.values()) > self._limit:
            sizes.pop(new.popitem()[0])
        total = sum(stat.st_size for stat in files.values()) + sum(sizes.values())
        for path in sorted(files, key=lambda path: (path in paths, files[path].st_mtime_ns)):
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= files[path].st_size

    def _chain(self, tokens: Array) -> list[Link]:
        """The files that `tokens` go through, one for each segment, up to one with which they agree no further."""
        names = {path.name for path in self._folder.glob(f"*{SUFFIX}") if path not in self._dropped}
        links: list[Link] = []
        for begin, length, path in self._files(tokens):
            same = [path.name] if path.name in names else []  # all of the segment, most probably
            before = path.name[: KEY_DIGITS + 1]
            found = self._links(same, begin, tokens)
            if not found or found[0].length < length:
                found = self._links([name for name in names if name.startswith(before)], begin, tokens)
            if not found:
                break
            links.append(max(found, key=lambda link: link.length))
            if links[-1].length < begin + ATTENTION_SEGMENT:
                break
        return links

    def _links(self, names: Items[str], begin: int, tokens: Array) -> list[Link]:
        """Those of the files that agree with `tokens` beyond position `begin`."""
        found = []
        for path in (self._folder / name for name in names):
            try:
                with self._sessions.open(path) as file:
                    session = file.session
            except (SessionError, DiskError) as error:
                self._drop(path, error)
                continue
            length = common(session.tokens, tokens)
            if session.extent.begin == begin < length:
                states = tuple(position for position in session.extent.states if position <= length)
                found.append(Link(path, begin, length, len(session.tokens), session.extent.top, states))
        return found

    def _files(self, tokens: Array) -> Iterator[tuple[int, int, Path]]:
        """Beginning, end and file of each segment of `tokens`."""
        state = self._seed.copy()
        for begin in range(0, len(tokens), ATTENTION_SEGMENT):
            length = min(begin + ATTENTION_SEGMENT, len(tokens))
            before = state.hexdigest()[:KEY_DIGITS]
            state.update(tokens[begin:length].astype("<i4").tobytes())
            yield begin, length, self._folder / f"{before}-{state.hexdigest()[:KEY_DIGITS]}{SUFFIX}"

    def _reach(self, links: Items[Link], kv: KvCache) -> tuple[int, int]:
        """Of tokens that go through `links`: how many can be gone on from, and how many the sequence has had by then.

        It is taken for the sequence that was saved, or for one that has never had more.
        """
        states = [position for link in links for position in link.states]
        for link in reversed(links):
            for top in (link.top, link.length):
                length = kv.reach(link.length, top, states)
                used = [each for each in links if each.begin < length]
                if length and all(each.serves(window, top) for each in used for window in self._windows):
                    return length, top
        return 0, 0

    def _open_all(self, links: Iterable[Link], opened: list[Path]) -> Iterator[SessionFile]:
        for link in links:
            opened.append(link.path)
            with self._sessions.open(link.path) as file:
                yield file

    def _drop(self, path: Path, error: Exception) -> None:
        """Remove what cannot be used. What has vanished is no error."""
        self._dropped.add(path)
        try:
            path.unlink()
        except FileNotFoundError:
            return
        except OSError:
            pass  # it is not opened again
        _warn(f"{error}. What was kept in it is computed again")


def _touch(paths: Items[Path]) -> None:
    """Note that these were used now; those that follow others a little earlier, so that they go before them."""
    now = time.time_ns()
    for i, path in enumerate(paths):
        with contextlib.suppress(OSError):  # it has vanished, or belongs to somebody else
            os.utime(path, ns=(now - i, now - i))


def _warn(text: str) -> None:
    warnings.warn(text, SessionWarning, stacklevel=3)
