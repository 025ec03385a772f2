"""How fast this machine computes rows and reads weights: what the number of sequences is chosen by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flashrt.engine.runtime import Runtime
from flashrt.storage.layout import PackLayout, TensorLayout
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import MATRIX_ROWS

BYTES = 8 << 20  # of weights that are multiplied by: more than a core keeps to itself
WIDE_ROWS = 64
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that a byte of weights takes, by the rows that it is multiplied by."""

    one: float  # of a narrow call, a single row
    full: float  # 16 rows
    wide: float  # a row of many

    def narrow(self, rows: float) -> float:
        """Of so many narrow rows, which take a call for 16."""
        whole, rest = divmod(rows, NARROW_TOKENS)
        share = (rest - 1) / (NARROW_TOKENS - 1)
        return whole * self.full + (self.one + share * (self.full - self.one) if rest >= 1 else rest * self.one)


def measure(layout: PackLayout, runtime: Runtime) -> Rates:
    """Measured on the matrix of the layout that most bytes are like, filled with zeros; a tenth of a second or so."""
    tensor = max((t for t in layout.tensors.values() if t.name != "embed"), key=_matrix_bytes)
    stride = tensor.stride // tensor.bundle_rows * MATRIX_ROWS
    bundles = np.zeros((max(BYTES // stride, 1), stride), np.uint8)
    rows = len(bundles) * MATRIX_ROWS
    x, out = np.ones((WIDE_ROWS, tensor.columns), np.float32), np.empty((WIDE_ROWS, rows), np.float32)
    ops, nbytes = runtime.ops, bundles.nbytes

    def narrow(count: int) -> float:
        return _seconds(lambda: ops.linear(x[:count], bundles, tensor.codec, out[:count], 0, rows)) / nbytes

    scratch = np.empty(ops.gemm_scratch_bytes(WIDE_ROWS, tensor.columns), np.uint8)
    wide = _seconds(lambda: ops.gemm_linear(x, bundles, tensor.codec, out, 0, rows, None, scratch)) / nbytes
    return Rates(narrow(1), narrow(NARROW_TOKENS), wide / WIDE_ROWS)


def _matrix_bytes(tensor: TensorLayout) -> int:
    """0 for what is no plain matrix of bundles of rows."""
    return tensor.nbytes if tensor.bundle_rows == MATRIX_ROWS and tensor.runs == 1 else 0


def _seconds(call: Callable[[], None]) -> float:
    """The least of some times: others on the machine only ever make it longer."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best
