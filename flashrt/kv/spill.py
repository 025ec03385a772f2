"""Pages of keys and values on disk: written behind by a thread, and read only once they are wholly there.

A page is copied into a buffer and written from it. Until the buffer is wanted for another page, it serves the page; so
nobody waits for a write, unless all buffers are being written. Pages are known by layer and segment. One that is put
again replaces the one before.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

import numpy as np

from flashrt.kv.far_layout import FarLayout, PageId

BUFFERS = 8  # pages on their way to disk at once
SPILL_BUFFERS = BUFFERS + 1  # with the one for a page that is read out of turn

Array = np.ndarray


class Reading(Protocol):
    """A page on its way to its memory; see `flashrt.storage.reader.Ticket`."""

    @property
    def ready(self) -> bool: ...
    def wait(self) -> None: ...
    def cancel(self) -> None: ...


class File(Protocol):
    """What pages are written to; see `flashrt.storage.scratch_file.ScratchFile`."""

    def write(self, offset: int, data: Array) -> None: ...
    def close(self) -> None: ...


class Reads(Protocol):
    """Starts reads of the file."""

    def page(self, offset: int, out: Array) -> Reading:
        """From a byte of the file into memory, uint8 [n], page-aligned."""

    def cells(self, offsets: Array, out: Array, slots: Array) -> Reading:
        """len(out[0]) bytes from offsets[i] each (int64 [n]) into out[slots[i]]."""


class Spill:
    """`layout` says where each page lies in `file`; a row of `buffers` (uint8 [n, bytes], page-aligned) holds any.

    The last row is for pages that are read out of turn, the others for those on their way to disk.

    A write that fails shows at the next use of any page, which raises its DiskError, until `restart`.
    """

    def __init__(self, file: File, layout: FarLayout, buffers: Array, reads: Reads) -> None:
        self._file, self.layout, self._reads = file, layout, reads
        self._buffers, self._landing = buffers[:-1], buffers[-1]
        self._changed = threading.Condition()
        self._closed = self._writing = False
        self._landed: PageId | None = None  # the page that was read out of turn last
        self._clear()
        self.bytes_read = 0
        self.version = 0  # of what pages hold: reads that were begun for an earlier one bring what is gone
        self._writer = threading.Thread(target=self._write_behind, name="flashrt-kv", daemon=True)
        self._writer.start()

    @property
    def failed(self) -> bool:
        """Whether a page could not be written, and is lost."""
        return self._error is not None

    def put(self, page: PageId, values: Array) -> None:
        """Take over the keys and values of a page, uint8 in all but shape. Raises DiskError."""
        with self._changed:
            while not self._idle:
                self._check()
                self._changed.wait()
            self._check()
            buffer = self._idle.popleft()
            if (old := self._holds.pop(buffer, None)) is not None:
                del self._pages[old]
        flat = self._buffers[buffer].view(values.dtype)[: values.size]
        flat.reshape(values.shape)[...] = values
        with self._changed:
            self._forget(page)
            self._pages[page], self._holds[buffer] = buffer, page
            self._queue.append((page, buffer))
            self._changed.notify_all()

    def submit(self, page: PageId, out: Array) -> Reading:
        """Start bringing a page into `out` (uint8 [its nbytes], page-aligned).

        It may be one that is yet to be put: by the time that it is waited for it must have been.
        """
        with self._changed:
            written = page in self._written
        return self._begin(page, out) if written else _Late(self, page, out)

    def fetch(self, page: PageId) -> Array:
        """A page out of turn, uint8 [its nbytes]; valid until the next is put or fetched. Raises DiskError."""
        nbytes = self.layout.place(page).nbytes
        with self._changed:
            self._check()
            buffer, written = self._pages.get(page), page in self._written
        if buffer is not None:
            return self._buffers[buffer, :nbytes]
        if not written:
            raise RuntimeError(f"page {page.segment} of layer {page.layer} was never put")
        landing = self._landing[:nbytes]
        if page != self._landed:
            self._landed = None
            self._begin(page, landing).wait()
            self._landed = page
        return landing

    def submit_cells(self, layer: int, cells: Array, out: Array, slots: Array) -> Reading:
        """Start bringing cells of pages that were put (see `FarLayout.cell_places`) into rows `slots` of `out`.

        Those of pages that are in a buffer are there at once. Raises DiskError.
        """
        segments, within = self.layout.cell_places(layer, cells)
        left = np.ones(len(cells), bool)
        with self._changed:
            self._check()
            buffered = [(page.segment, buffer) for page, buffer in self._pages.items() if page.layer == layer]
        for segment, buffer in buffered:
            own = np.flatnonzero(segments == segment)
            out[slots[own]] = self._buffers[buffer, : self.layout.page_bytes[layer]].reshape(-1, out.shape[1])[
                within[own] // out.shape[1]
            ]
            left[own] = False
        offsets = self.layout.place(PageId(layer, 0)).offset + segments[left] * self.layout.page_bytes[layer]
        self.bytes_read += len(offsets) * out.shape[1]
        return self._reads.cells(offsets + within[left], out, slots[left])

    def forget(self, layer: int, segment: int) -> None:
        """The pages of a layer from `segment` on are no longer those of the sequence."""
        with self._changed:
            for page in [*self._written, *self._pages]:
                if page.layer == layer and page.segment >= segment:
                    self._forget(page)
            self.version += 1

    def restart(self) -> None:
        """Forget all pages, and the writes that failed; also what an interrupt has left half done."""
        with self._changed:
            self._queue.clear()
            while self._writing:
                self._changed.wait()
            self._clear()
            self.version += 1

    def close(self) -> None:
        """Stop writing and give the file up, after reads are over. Closing again does nothing."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        self._writer.join()
        self._file.close()

    def _clear(self) -> None:
        self._idle = deque(range(len(self._buffers)))  # those not waiting to be written, the oldest first
        self._queue: deque[tuple[PageId, int]] = deque()
        self._pages: dict[PageId, int] = {}  # buffer that holds a page
        self._holds: dict[int, PageId] = {}  # page that a buffer holds
        self._written: set[PageId] = set()
        self._landed = None
        self._error: Exception | None = None

    def _forget(self, page: PageId) -> None:
        self._written.discard(page)
        if page == self._landed:
            self._landed = None
        if (buffer := self._pages.pop(page, None)) is not None:
            del self._holds[buffer]

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _begin(self, page: PageId, out: Array) -> Reading:
        place = self.layout.place(page)
        self.bytes_read += place.nbytes
        return self._reads.page(place.offset, out)

    def _write_behind(self) -> None:
        while (job := self._next()) is not None:
            page, buffer = job
            place, error = self.layout.place(page), None
            try:
                self._file.write(place.offset, self._buffers[buffer, : place.nbytes])
            except Exception as failure:  # raised where the next page is asked for
                error = failure
            with self._changed:
                self._writing = False
                self._error = self._error or error
                if error is None and self._pages.get(page) == buffer:
                    self._written.add(page)
                self._idle.append(buffer)
                self._changed.notify_all()

    def _next(self) -> tuple[PageId, int] | None:
        """The next page to write and its buffer; None once closed."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._writing = True
            return self._queue.popleft()


class _Late:
    """A page that was not on disk when it was asked for: fetched when it is waited for."""

    def __init__(self, spill: Spill, page: PageId, out: Array) -> None:
        self._spill, self._page, self._out = spill, page, out

    ready = False

    def wait(self) -> None:
        self._out[:] = self._spill.fetch(self._page)

    def cancel(self) -> None:
        """Nothing is under way."""
