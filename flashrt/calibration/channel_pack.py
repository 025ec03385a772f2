"""A calibrated pack's contents: the base pack's own bytes, and its feed-forward blocks in the order that was fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flashrt.calibration.fit_channels import ChannelBlock, ChannelFit
from flashrt.calibration.pack_copy import PackCopy, read_bundles
from flashrt.sparsity import ChannelSparsity
from flashrt.storage.layout import TensorLayout
from flashrt.storage.pack import Pack
from flashrt_kernels.channels import ChannelVectors, encode_channels

Array = np.ndarray


class ChannelPackSource(PackCopy):
    """What the packer asks of a checkpoint, and its encoder.

    `fit(i)` gives what was fitted to block i, `layers` how many of its channels are stored whole.
    """

    def __init__(self, base: Pack, fit: Callable[[int], ChannelFit], layers: Sequence[ChannelSparsity]) -> None:
        super().__init__(base)
        self.fit, self.layers = fit, layers
        self._at = -1
        self._groups: Array = np.empty((0, 0), np.uint8)
        self._vectors: dict[str, Array] = {}

    def vector(self, key: str) -> Array:
        layer = key.partition(".")[0]
        if layer.isdigit():
            self._encode(int(layer))
            if key in self._vectors:
                return self._vectors[key]
        return super().vector(key)

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        layer, _, kind = tensor.name.partition(".")
        if kind == "channels":
            self._encode(int(layer))
            bundles[:] = self._groups[first : first + len(bundles)]
        elif kind == "down":
            self._encode(int(layer))
            rows = self._down[first : first + len(bundles)]
            bundles[:, : rows.shape[1]] = rows
        else:
            super().fill(tensor, run, first, bundles)

    def _encode(self, i: int) -> None:
        """Make block `i` the one at hand."""
        if self._at == i:
            return
        block, fit = read_ffn(self.base, i), self.fit(i)
        self._groups, vectors = encode_channels(block.parts(), fit.order, self.layers[i].fine)
        self._down = block.down
        self._vectors = _named(i, fit, vectors, self.spec.hidden)
        self._at = i


def _named(i: int, fit: ChannelFit, vectors: ChannelVectors, hidden: int) -> dict[str, Array]:
    return {
        f"{i}.channels.scale": vectors.scale,
        f"{i}.channels.ratio": vectors.ratio,
        f"{i}.channels.norms": fit.norms,
        f"{i}.channels.order": np.where(fit.order < hidden, fit.order, -1).astype(np.float32),
        f"{i}.down.norms": fit.down_norms,
    }


def read_ffn(pack: Pack, i: int) -> ChannelBlock:
    """The weights of dense block `i`. Raises PackError where they are damaged."""
    return ChannelBlock(pack.spec.layers[i].ffn, pack.spec.hidden, read_bundles(pack, f"{i}.ffn"))
