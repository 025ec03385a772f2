"""A session on disk: tokens, and what was computed of them, keys, values and states, bound to the pack that computed.

    magic, format version, length of all up to the first page, length of the JSON, CRC-32 of what follows up to there
    JSON         what the session is bound to, where it begins and ends, the messages of a conversation
    tokens       int32, all of them, also those before a session that begins later
    checksums    uint32, the CRC-32 of each page
    pages        in the order of `kv.pages`, each on a boundary of 4 KiB

Numbers are little-endian. A file is there whole or not at all, and as long as its header says, to the byte.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import get_native_id
from types import TracebackType
from typing import Any

import numpy as np

from flashrt.errors import DiskError, SessionError
from flashrt.kv.marks import MARKS
from flashrt.kv.pages import Extent, Page, StatePage, firsts, pages
from flashrt.spec import Mixer, ModelSpec
from flashrt.storage import _io
from flashrt.storage.atomic import disk_errors, remove_leftovers, replacing
from flashrt.storage.direct import open_direct
from flashrt.storage.reader import DEPTH, Reader, Ticket
from flashrt.storage.safetensors_file import PAGE
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT
from flashrt_kernels.rows import align

VERSION = 1
MAX_JSON_BYTES = 16 << 20  # of messages: more than a conversation of a million tokens

Array = np.ndarray
AnyPage = Page | StatePage
Messages = Sequence[Mapping[str, str]]

FORM_OPTIONS = {  # parts of `KvForm.shapes`, and what they come from
    "item": "--kv-dtype",
    "layers": "--rope-scaling",
    "rotations": "--context, on which this model's rotation depends,",
    "choice": "--kv, --kv-keep and labels",
    "experts": "--experts-used",
}

_MAGIC = b"flashrt session\n"
_HEAD = struct.Struct("<16s4I")


@dataclass(frozen=True)
class KvForm:
    """What keys and values are bound to: a pack, their type of numbers, and all else that they depend on."""

    pack: str  # its hash
    spec: ModelSpec
    codec: KvCodec
    context: int  # that was planned for: some kinds of rotation depend on it
    choice: str | None  # `SparseKv.digest` of what decode passes chose by; None: they attended to everything
    experts: int | None = None  # that routers name, where that is fewer than the pack says

    @property
    def dtype(self) -> np.dtype:
        """Of the stores' items."""
        return np.dtype(self.codec.dtype)

    @functools.cached_property
    def shapes(self) -> dict[str, Any]:
        """As the file says it: what attention of each layer is, equal neighbours once with a count."""
        runs = []
        for run in self.spec.to_json()["layers"]:
            (mixer,) = (value for part, value in run["layer"].items() if part != "ffn")
            runs.append({"count": run["count"], **mixer})
        ropes = [attention.rope for attention in self.spec.attentions.values()]
        rotations = sorted({rope.variant(self.context) for rope in ropes if rope is not None})
        fewer = {} if self.experts is None else {"experts": self.experts}
        return {"item": self.codec.value, "layers": runs, "rotations": rotations, "choice": self.choice} | fewer

    @functools.cached_property
    def largest_header(self) -> int:
        """Bytes of the header of a session that fills the context."""
        whole = Extent(0, self.spec.context, 0, tuple(range(1, MARKS + 1)), True)
        return MAX_JSON_BYTES + 4 * (whole.length + len(self.pages(whole)))

    @functools.cached_property
    def mixers(self) -> list[Mixer]:
        """Of the layers."""
        return [layer.mixer for layer in self.spec.layers]

    def pages(self, extent: Extent) -> list[AnyPage]:
        return list(pages(self.mixers, extent, self.codec))

    def nbytes(self, page: AnyPage) -> int:
        """Of a page in memory; on disk it goes on to a multiple of 4 KiB."""
        return page.items * self.dtype_of(page).itemsize

    def dtype_of(self, page: AnyPage) -> np.dtype:
        """Of its numbers."""
        return np.dtype(np.float32) if isinstance(page, StatePage) else self.dtype


@dataclass(frozen=True)
class Session:
    """What a file holds beside pages. `extent` says of which of the tokens, `messages` are those of a conversation."""

    tokens: Array  # int32
    extent: Extent
    messages: Messages | None = None


def write_session(
    path: Path, form: KvForm, session: Session, fill: Callable[[AnyPage, Array], None], memory: Array
) -> None:
    """Write a session in place of what was at `path`, which stays as it is should that fail.

    fill: copies the keys and values of a page into an array of its shape
    memory: uint8, which holds a page on its way
    Raises DiskError.
    """
    found = form.pages(session.extent)
    checksums = np.zeros(len(found), np.uint32)
    start = len(_header(form, session, checksums))
    size = start + sum(align(form.nbytes(page), PAGE) for page in found)
    with disk_errors(path.parent):
        remove_leftovers(path)
    with disk_errors(path.parent), replacing(path, f".{get_native_id()}.{os.getpid()}.tmp") as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is known before anything is written
        file.seek(start)
        for i, page in enumerate(found):
            nbytes = form.nbytes(page)
            out = memory[: align(nbytes, PAGE)]
            out[nbytes:] = 0
            fill(page, out[:nbytes].view(form.dtype_of(page)).reshape(page.shape))
            checksums[i] = _io.crc32(out)
            file.write(out.data)
        file.seek(0)
        file.write(_header(form, session, checksums))


def session_bytes(form: KvForm, extent: Extent) -> int:
    """What the file of a session without messages takes."""
    found = form.pages(extent)
    header = _header(form, Session(np.zeros(extent.length, np.int32), extent), np.zeros(len(found), np.uint32))
    return len(header) + sum(align(form.nbytes(page), PAGE) for page in found)


def page_bytes(form: KvForm) -> int:
    """What the largest page takes on disk."""
    last = Extent(0, ATTENTION_SEGMENT, 0, ends=True)
    return max(align(form.nbytes(page), PAGE) for page in form.pages(last))


class SessionFile:
    """A session that is open for reading; its header is checked, its pages are as they are read.

    Raises SessionError for what is missing, damaged or of another pack, version or form of keys and values, DiskError
    when reading fails.
    """

    def __init__(self, path: Path, form: KvForm) -> None:
        self.path, self._form = path, form
        _check_file(path)
        self._handle, self._direct = open_direct(path)
        try:
            self.session, checksums, start = self._read_header()
            self._places: list[tuple[AnyPage, int, int]] = []  # page, offset, CRC-32
            for page, checksum in zip(form.pages(self.session.extent), checksums.tolist(), strict=True):
                self._places.append((page, start, checksum))
                start += align(form.nbytes(page), PAGE)
            if start != os.fstat(self._handle).st_size:
                raise self._damaged(f"it has {os.fstat(self._handle).st_size} bytes, expected {start}")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SessionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._handle)

    def read(self, reader: Reader, extent: Extent) -> Iterator[tuple[AnyPage, Array]]:
        """The pages that `extent` needs of this file, many reads in flight; each array is valid until the next page.

        `reader` reads nothing else meanwhile: its staging memory takes the pages.
        """
        form = self._form
        begins = firsts(form.mixers, extent.length, extent.top)
        reader.settle()
        size = page_bytes(form)
        free = deque(reader.staging[at : at + size] for at in range(0, len(reader.staging) - size + 1, size))
        flying: deque[tuple[AnyPage, Ticket, Array]] = deque()

        def wanted(page: AnyPage) -> bool:
            if isinstance(page, StatePage):
                return page.position in extent.states
            return begins[page.layer] <= page.begin < extent.length

        def finish() -> tuple[AnyPage, Array]:
            page, ticket, buffer = flying.popleft()
            ticket.wait()
            free.append(buffer)
            return page, buffer[: form.nbytes(page)].view(form.dtype_of(page)).reshape(page.shape)

        try:
            for page, offset, checksum in self._places:
                if not wanted(page):
                    continue
                if not free or len(flying) == DEPTH:
                    yield finish()
                buffer = free.popleft()
                target = buffer[: align(form.nbytes(page), PAGE)]
                read = reader.read_file(self._handle, self._direct, offset, target, checksum)
                flying.append((page, _PageTicket(self.path, read), buffer))
            while flying:
                yield finish()
        finally:
            flying.clear()
            reader.settle()

    def _read_header(self) -> tuple[Session, Array, int]:
        """The session, the checksums of its pages, and where these begin."""
        size = os.fstat(self._handle).st_size
        head = self._read(0, min(size, PAGE))
        if len(head) < _HEAD.size or not head.startswith(_MAGIC):
            raise SessionError(f"{self.path} is not a session: name another file")
        _, version, nbytes, json_bytes, checksum = _HEAD.unpack_from(head)
        if version != VERSION:
            raise SessionError(
                f"{self.path} is a session of format version {version}, this flashrt reads version {VERSION}: "
                "use the flashrt that saved it, or delete it"
            )
        if nbytes > min(size, self._form.largest_header) or nbytes < _HEAD.size + json_bytes:
            raise self._damaged(f"it has {size} bytes, its header would have {nbytes}")
        body = self._read(_HEAD.size, nbytes - _HEAD.size)
        if _io.crc32(np.frombuffer(body, np.uint8)) != checksum:
            raise self._damaged("the checksum of its header does not match")
        extent, messages = self._parse(body[:json_bytes])
        count = extent.length + len(self._form.pages(extent))
        if nbytes != align(_HEAD.size + json_bytes + 4 * count, PAGE):
            raise self._damaged(f"its header has {nbytes} bytes, which is not what {count} numbers take")
        numbers = np.frombuffer(body, "<u4", count, json_bytes)
        tokens = numbers[: extent.length].astype(np.int32)
        return Session(tokens, extent, messages), numbers[extent.length :], nbytes

    def _parse(self, text: bytes) -> tuple[Extent, Messages | None]:
        """What the JSON says."""
        form = self._form
        try:
            body = json.loads(text)
            if body["pack"] != form.pack:
                raise SessionError(
                    f"{self.path} was saved with another pack (hash {str(body['pack'])[:12]}, expected "
                    f"{form.pack[:12]}): load that one, or name another file"
                )
            for part, options in FORM_OPTIONS.items():
                if body["kv"].get(part) != form.shapes.get(part):
                    raise SessionError(
                        f"{self.path} was saved with keys and values of another form: "
                        f"use the {options} that it was saved with, or name another file"
                    )
            extent = Extent(*(body[name] for name in ("begin", "length", "top")))
            if form.spec.delta_nets:
                extent = replace(extent, marks=tuple(body["marks"]), ends=body["ends"])
            messages = body["messages"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from None
        known = all(type(value) is int for value in (extent.begin, extent.length, extent.top))
        if not known or not 0 <= extent.begin < extent.length <= extent.top <= form.spec.context:
            raise self._damaged(f"it goes from {extent.begin} to {extent.length}, of {extent.top} tokens")
        if extent.begin % ATTENTION_SEGMENT or not _are_marks(extent) or not _are_messages(messages):
            raise self._damaged("its header says what no session has")
        return extent, messages

    def _read(self, offset: int, nbytes: int) -> bytes:
        """Bytes of the header, by whole pages: the file may be open around the page cache. Fewer where it ends."""
        with mmap.mmap(-1, max(align(offset + nbytes, PAGE), PAGE)) as memory:
            try:
                os.preadv(self._handle, [memory], 0)
            except OSError as error:
                raise DiskError(f"reading {self.path} failed: {error.strerror}") from None
            return memory[offset : offset + nbytes]

    def _damaged(self, how: str) -> SessionError:
        return SessionError(f"{self.path} is damaged ({how}): delete it, or name another file")


class _PageTicket(Ticket):
    """A page on its way."""

    __slots__ = ()

    def _failure(self, status: int) -> Exception:
        if status in (_io.DAMAGED, _io.ENDED):
            how = "a page does not match its checksum" if status == _io.DAMAGED else "it was cut short while in use"
            return SessionError(f"{self._path} is damaged ({how}): delete it, or name another file")
        return super()._failure(status)


def _header(form: KvForm, session: Session, checksums: Array) -> bytes:
    """All that stands before the pages, padded; as long for any checksums."""
    extent = session.extent
    body = {
        "pack": form.pack,
        "kv": form.shapes,
        "begin": extent.begin,
        "length": extent.length,
        "top": extent.top,
        "messages": session.messages,
    }
    if form.spec.delta_nets:
        body |= {"marks": extent.marks, "ends": extent.ends}
    text = json.dumps(body, separators=(",", ":")).encode()
    data = text + session.tokens.astype("<i4").tobytes() + checksums.astype("<u4").tobytes()
    data = data.ljust(align(_HEAD.size + len(data), PAGE) - _HEAD.size, b"\0")
    checksum = _io.crc32(np.frombuffer(data, np.uint8))
    return _HEAD.pack(_MAGIC, VERSION, _HEAD.size + len(data), len(text), checksum) + data


def _check_file(path: Path) -> None:
    """Raises SessionError where there is no file: a pipe would be waited for."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise SessionError(f"{path} does not exist: a session is saved by --session, or by engine.save") from None
    except (OSError, ValueError) as error:
        raise SessionError(f"{path} cannot be opened: {error}") from None
    if not stat.S_ISREG(mode):
        raise SessionError(f"{path} is no file: a session is one")


def _are_marks(extent: Extent) -> bool:
    """Whether its marks are some that a sequence can have."""
    marks = extent.marks
    whole = all(type(mark) is int and extent.begin < mark <= extent.length for mark in marks)
    return whole and len(marks) <= MARKS and list(marks) == sorted(set(marks)) and type(extent.ends) is bool


def _are_messages(value: Any) -> bool:
    """Whether these are messages, or None."""
    return value is None or (
        isinstance(value, list)
        and all(isinstance(each, dict) and each.keys() == {"role", "content"} for each in value)
        and all(isinstance(text, str) for each in value for text in each.values())
    )
