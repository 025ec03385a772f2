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

    def read(offset: int, buffer: np.ndarray) -> Ticket:
        return Ticket(file.path, reader.read_file(file.handle, file.direct, offset, buffer))

    buffers = device.allocate("KV buffers", (SPILL_BUFFERS, layout.largest), np.uint8)
    return Spill(file, layout, buffers, read)
