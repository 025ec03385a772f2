"""Opens the file that keys and values go to which memory does not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flashrt.cache.device import Device
from flashrt.errors import DiskError
from flashrt.kv.far_layout import FarLayout
from flashrt.kv.spill import SPILL_BUFFERS, Spill
from flashrt.storage.reader import Reader, Ticket
from flashrt.storage.scratch_file import ScratchFile


def open_spill(folder: Path, layout: FarLayout, device: Device, reader: Reader) -> Spill:
    """A spill in `folder`, which is made where it is not there. Raises DiskError where that has no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder} cannot be made, for keys and values: {error.strerror}") from None
    file = ScratchFile(folder, layout.nbytes)
    buffers = device.allocate("KV buffers", (SPILL_BUFFERS, layout.largest), np.uint8)
    return Spill(file, layout, buffers, _Reads(file, reader))


class _Reads:
    """Reads of `file` by the engine that reads weights."""

    def __init__(self, file: ScratchFile, reader: Reader) -> None:
        self._file, self._reader = file, reader

    def page(self, offset: int, out: np.ndarray) -> Ticket:
        file = self._file
        return Ticket(file.path, self._reader.read_file(file.handle, file.direct, offset, out))

    def cells(self, offsets: np.ndarray, out: np.ndarray, slots: np.ndarray) -> Ticket:
        file = self._file
        return Ticket(file.path, self._reader.read_file_rows(file.handle, file.direct, offsets, out, slots))
