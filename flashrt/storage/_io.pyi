"""The native I/O engine; see native/engine.h."""

import numpy as np

ENDED: int
DAMAGED: int
CANCELLED: int

def crc32(data: np.ndarray, portable: bool = False) -> int:
    """What zlib.crc32 gives; with `portable`, computed without special instructions."""

def spans(offsets: np.ndarray, row_bytes: int, costs: list[float]) -> list[tuple[int, int]]:
    """Rows [first, last) of each read, for rows of equal length at ascending offsets (int64)."""

class Read:
    """What was asked for with one call. Dropping it cancels it and waits for what the system has begun."""

    @property
    def ready(self) -> bool: ...
    @property
    def at(self) -> int:
        """Byte of the file where it went wrong."""
    @property
    def bytes_read(self) -> int:
        """Bytes that came from the file so far, gaps and the rest of pages included."""

    def wait(self) -> int:
        """0, an errno, or one of ENDED, DAMAGED, CANCELLED. Ctrl-C interrupts the wait, not the read."""

    def cancel(self) -> None:
        """Drop what the system has not begun."""

class Engine:
    """Reads in flight: at most `depth`, each of at most `chunk` bytes (a multiple of 4096).

    `backend` is 'io_uring', 'pread' or '' for the better one that this system has; RuntimeError when it has not.
    `staging` (uint8, page-aligned, at least 64 KiB) is memory for reads whose ends or destinations are not aligned, and
    for rows that are read together: up to a sixteenth of it per read.
    """

    def __init__(self, backend: str, depth: int, chunk: int, staging: np.ndarray) -> None: ...
    @property
    def backend(self) -> str: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def max_span_pages(self) -> int: ...
    def set_costs(self, costs: list[float]) -> None:
        """Merge rows from now on: costs[n - 1] is what a read of n pages costs, in any unit."""

    def read(
        self, file: int, direct: bool, offset: int, buffer: np.ndarray, crc: int | None = None, cached: int = -1
    ) -> Read:
        """Start to fill `buffer` (uint8 [n]) from `offset`; its CRC-32 is compared when one is given.

        What the page cache has is copied from `cached`, a descriptor of the same file that is not direct.
        """

    def read_rows(self, file: int, direct: bool, offsets: np.ndarray, out: np.ndarray, slots: np.ndarray) -> Read:
        """Start to read len(out[0]) bytes from offsets[i] into out[slots[i]], for all i (int64 arrays)."""

    def settle(self) -> None:
        """Return when all reads are over."""

    def close(self) -> None:
        """Finish what the system has begun, cancel the rest, end the threads."""
