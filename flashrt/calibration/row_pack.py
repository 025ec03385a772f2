"""The contents of a pack calibrated by row: neurons in the order that was fitted, behind their predictors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flashrt.calibration.fit_heads import HeadFit
from flashrt.calibration.fit_rows import RowFit
from flashrt.calibration.pack_copy import PackCopy, read_bundles
from flashrt.model.predictors.low_rank import encode
from flashrt.storage.layout import PREDICTOR, TensorLayout
from flashrt.storage.pack import Pack
from flashrt_kernels.ops import Ops

Array = np.ndarray


class RowPackSource(PackCopy):
    """What the packer asks of a checkpoint, and its encoder. `fit(i)` gives what was fitted to block i."""

    def __init__(self, base: Pack, fit: Callable[[int], RowFit], kernels: Ops[Array]) -> None:
        super().__init__(base)
        self.fit, self.kernels = fit, kernels
        self._at = ""
        self._bundles: Array = np.empty((0, 0), np.uint8)

    def vector(self, key: str) -> Array:
        layer, _, kind = key.partition(".")
        if kind == "up.bias":
            return super().vector(key)[self.fit(int(layer)).order]
        if PREDICTOR in key:
            fit = self.fit(int(layer))
            return _heads(fit).bias if kind.startswith("predictor.heads") else fit.factors.bias
        return super().vector(key)

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        if PREDICTOR not in tensor.name and not tensor.name.endswith(".ffn"):
            super().fill(tensor, run, first, bundles)
            return
        if self._at != tensor.name:
            self._bundles = self._encoded(tensor.name)
            self._at = tensor.name
        bundles[:] = self._bundles[first : first + len(bundles)]

    def _encoded(self, name: str) -> Array:
        layer, _, kind = name.partition(".")
        fit = self.fit(int(layer))
        if kind == "ffn":
            return read_bundles(self.base, name)[fit.order]
        factors = {"predictor.down": fit.factors.down, "predictor.up": fit.factors.up}
        return encode(self.kernels, _heads(fit).weights if kind == "predictor.heads" else factors[kind])


def _heads(fit: RowFit) -> HeadFit:
    assert fit.heads is not None
    return fit.heads
