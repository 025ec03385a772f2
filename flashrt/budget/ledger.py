"""Enforces a plan: every large allocation names its owner, and no owner gets more than it was planned."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping, Sequence

import numpy as np

from flashrt.config import GIB
from flashrt.errors import BudgetError

Array = np.ndarray

HUGE_PAGE = 2 << 20  # bytes


class Ledger:
    """Hands out page-aligned, zeroed host memory. `grants` maps owner → bytes."""

    def __init__(self, grants: Mapping[str, int]) -> None:
        self._left = dict(grants)

    def allocate(self, owner: str, shape: Sequence[int], dtype: np.dtype | type) -> Array:
        """An array of zeros charged to `owner`. Raises BudgetError when the grant is used up or the system refuses."""
        count = math.prod(shape)
        nbytes = count * np.dtype(dtype).itemsize
        self.charge(owner, nbytes)
        if nbytes == 0:
            return np.zeros(shape, dtype)
        try:
            region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BudgetError(
                f"the system refuses {nbytes / GIB:.3f} GiB of memory for {owner} ({error.strerror}): "
                "use a smaller --budget-gb or --context, or raise the limit on the process's memory"
            ) from None
        if nbytes >= HUGE_PAGE:
            # Weights are read front to back for every token: with 4 KiB pages, address translation shows. A mapping
            # never holds more than it was asked for, so the budget does not notice.
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                region.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(region, dtype, count).reshape(shape)

    def charge(self, owner: str, nbytes: int) -> None:
        """Take `nbytes` from the grant of `owner`."""
        left = self._left.get(owner, 0)
        if nbytes > left:
            raise BudgetError(
                f"internal accounting error: {owner} asks for {nbytes} bytes and its plan has {left} left; "
                "please report this with the output of `flashrt plan`"
            )
        self._left[owner] = left - nbytes


def populate(array: Array) -> None:
    """Make every page of `array` resident now, so that nothing grows while decoding."""
    flat = array.reshape(-1).view(np.uint8)
    flat[:: mmap.PAGESIZE] = 0
