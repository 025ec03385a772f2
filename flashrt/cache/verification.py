"""Checksums of blocks of which only parts are wanted."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from flashrt.storage.layout import TensorLayout
from flashrt.storage.reader import Reader

Array = np.ndarray


class Verifier:
    """Reads a block whole the first time that a part of it is wanted, since a part cannot be checked.

    `window` (uint8, page-aligned, at least as large as any block) is what blocks are read into.
    """

    def __init__(self, reader: Reader, window: Array) -> None:
        self._reader, self._window = reader, window

    def check(self, tensor: TensorLayout, indices: Iterable[int]) -> None:
        """Compare those of the blocks with their checksums that have not been yet. Raises PackError, DiskError."""
        for block in map(tensor.block, indices):
            if not self._reader.verified(block):
                self._reader.submit(block, self._window[: block.nbytes]).wait()
