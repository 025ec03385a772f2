"""Saves a sequence to a file, and gives it back to an engine: as if the process had never ended."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np

from flashrt.engine.sequence import Sequence
from flashrt.errors import SessionError, UsageError
from flashrt.kv.pages import Extent, StatePage, firsts
from flashrt.storage.reader import Reader
from flashrt.storage.session_file import AnyPage, KvForm, Messages, Session, SessionFile, write_session
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


class Sessions:
    """Sequences of one engine on their way to files and back, through the reader's staging memory."""

    def __init__(self, form: KvForm, reader: Reader) -> None:
        self.form, self._reader = form, reader

    def save(
        self, sequence: Sequence, path: Path, extent: Extent | None = None, messages: Messages | None = None
    ) -> None:
        """Write `extent` of `sequence`, or all of it. Raises DiskError."""
        kv = sequence.kv
        extent = extent or Extent(0, kv.length, kv.top, kv.marks(), bool(kv.recurrent))
        session = Session(np.array(sequence.tokens[: extent.length], np.int32), extent, messages)

        def fill(page: AnyPage, out: Array) -> None:
            if isinstance(page, StatePage):
                kv.recurrent[page.layer].read_state(page.position, page.part, out)
            else:
                kv.keys_of(page.layer).read_page(page.begin, page.heads, out)

        self._reader.settle()
        write_session(path, self.form, session, fill, self._reader.staging)

    def open(self, path: Path) -> SessionFile:
        """Raises SessionError."""
        return SessionFile(path, self.form)

    def restore(
        self, sequence: Sequence, files: Iterable[SessionFile], tokens: Array, top: int, marks: Items[int] = ()
    ) -> None:
        """Make `sequence` hold `tokens`, of which there had been `top`, from files that follow one another.

        marks: after how many of them recurrent layers can be gone on from besides
        Raises SessionError or DiskError, and leaves an empty sequence.
        """
        kv, extent = sequence.kv, Extent(0, len(tokens), top, tuple(marks), ends=True)
        sequence.rewind(0)
        missing = len(self.form.pages(extent))
        if missing == 0:
            return
        try:
            kv.restart(firsts(self.form.mixers, len(tokens), top))
            for file in files:
                for page, values in file.read(self._reader, extent):
                    if isinstance(page, StatePage):
                        kv.recurrent[page.layer].write_state(page.position, page.part, values)
                    else:
                        part = values[:, : extent.length - page.begin]
                        kv.keys_of(page.layer).write_page(page.begin, page.heads, part)
                    missing -= 1
            if missing:
                raise SessionError(f"{file.path} and those before lack pages of {len(tokens)} tokens: delete them")
        except BaseException:
            sequence.rewind(0)
            raise
        sequence.restored(tokens.tolist(), top, marks)


def resumable(sequence: Sequence, session: Session, prompt: Items[int] | None) -> Array:
    """Tokens of `session` that a prompt goes on from (see `beginning`); for None, all.

    Raises UsageError where the context has no room for them.
    """
    kv, length = sequence.kv, len(session.tokens)
    if prompt is not None:
        length = common(session.tokens, beginning(prompt))
    if length >= kv.capacity:
        raise UsageError(
            f"the session has {length} tokens, the context is {kv.capacity}: use a --context of {length + 1} or more"
        )
    sequence.rewind(0)
    return session.tokens[: kv.reach(length, session.extent.top, session.extent.states)]


def beginning(prompt: Items[int]) -> Array:
    """What of a prompt need not be computed where it is kept: all but the fewest tokens that a wide pass has.

    So the rest is computed by the kernels that would compute all of it, and the text is the same.
    """
    return np.array(prompt[: -(NARROW_TOKENS + 1)], np.int32)


def common(ours: Array, theirs: Array) -> int:
    """How many tokens both begin with."""
    count = min(len(ours), len(theirs))
    different = np.flatnonzero(ours[:count] != theirs[:count])
    return int(different[0]) if len(different) else count
