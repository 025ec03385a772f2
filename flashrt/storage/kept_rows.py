"""Encodes the tensors of a pack that keeps what a file has: bytes of the file in the places of a pack."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from flashrt.errors import CheckpointError
from flashrt.storage.kept import Kept
from flashrt.storage.layout import TensorLayout
from flashrt.storage.packer import CHUNK_WEIGHTS, Encoder, RowEncoder, WeightSource
from flashrt_kernels.rows import KEPT, MATRIX_ROWS, Codec, NeuronCodecs, row_bytes
from flashrt_kernels.stored import LARGEST_EXPONENT

Array = np.ndarray


class StoredWeights(WeightSource, Protocol):
    """A checkpoint whose rows can be read as they are stored; see `flashrt.storage.sources`."""

    def stored_rows(self, key: str, start: int, stop: int) -> Array: ...
    def stored_neurons(self, key: str, run: int, start: int, stop: int) -> tuple[Array | None, Array]: ...
    def stored_down(self, key: str, run: int, start: int, stop: int) -> Array: ...
    def down_rows(self, key: str, run: int, start: int, stop: int) -> Array: ...


class KeptEncoder(Encoder):
    """Copies what is `kept` of a source, and quantizes the rest."""

    def __init__(self, source: StoredWeights, kept: Kept) -> None:
        self.source, self.kept, self._rest = source, kept, RowEncoder(source)

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        """Write bundles [first, first + len(bundles)) of one run of a tensor into `bundles` (zeros, [n, stride])."""
        codecs = self.kept.neurons.get(tensor.name)
        if codecs is not None:
            self._fill_neurons(tensor, codecs, run, first, bundles)
        elif tensor.codec in KEPT:
            self._fill_matrix(tensor, first, bundles)
        else:
            self._rest.fill(tensor, run, first, bundles)

    def _fill_matrix(self, tensor: TensorLayout, first: int, bundles: Array) -> None:
        size, step = row_bytes(tensor.codec, tensor.columns), max(CHUNK_WEIGHTS // (tensor.columns * MATRIX_ROWS), 1)
        for begin in range(0, len(bundles), step):
            part = bundles[begin : begin + step]
            start = (first + begin) * MATRIX_ROWS
            stop = min(start + len(part) * MATRIX_ROWS, tensor.rows)
            rows = self.source.stored_rows(tensor.matrix, tensor.row0 + start, tensor.row0 + stop)
            check_rows(tensor.name, tensor.codec, rows, (stop - start, size))
            places = part[:, : MATRIX_ROWS * size].reshape(len(part), MATRIX_ROWS, size)
            whole = len(rows) // MATRIX_ROWS
            places[:whole] = rows[: whole * MATRIX_ROWS].reshape(whole, MATRIX_ROWS, size)
            places[whole : whole + 1, : len(rows) % MATRIX_ROWS] = rows[whole * MATRIX_ROWS :]

    def _fill_neurons(self, tensor: TensorLayout, codecs: NeuronCodecs, run: int, first: int, bundles: Array) -> None:
        group, k = codecs.group, tensor.columns
        step = max(CHUNK_WEIGHTS // (k * group), 1)
        for begin in range(0, len(bundles), step):
            part = bundles[begin : begin + step]
            start, stop = (first + begin) * group, (first + begin + len(part)) * group
            gate, up = self.source.stored_neurons(tensor.name, run, start, stop)
            at = 0
            for codec, rows in ((codecs.gate, gate), (codecs.up, up)):
                if codec is None or rows is None:
                    continue
                size = row_bytes(codec, k)
                check_rows(tensor.name, codec, rows, (stop - start, size))
                part[:, at : at + group * size] = rows.reshape(len(part), group * size)
                at += group * size
            down = self._down(tensor.name, codecs, run, start, stop, k)
            part[:, at : at + down.shape[1]] = down

    def _down(self, name: str, codecs: NeuronCodecs, run: int, start: int, stop: int, k: int) -> Array:
        """Down of the neurons of some bundles, uint8 [bundles, bytes]."""
        if codecs.group == 1:
            return self._rest.encode(codecs.down, name, self.source.down_rows(name, run, start, stop), stop - start, k)
        count, size = (stop - start) // codecs.group, row_bytes(codecs.down, codecs.group)
        rows = self.source.stored_down(name, run, start, stop)
        check_rows(name, codecs.down, rows, (k, count * size))
        return rows.reshape(k, count, size).swapaxes(0, 1).reshape(count, k * size)


def check_rows(name: str, codec: Codec, rows: Array, shape: tuple[int, int]) -> None:
    """Refuse rows of another shape, and those of which a weight is not finite: then a scale is not.

    `rows` are uint8 [rows, bytes], in a kept codec. Raises CheckpointError.
    """
    if rows.shape != shape:
        raise CheckpointError(f"{name}: read {rows.shape} bytes, expected {shape}")
    block = KEPT[codec]
    blocks = rows.reshape(-1, block.nbytes)
    bad = codec is Codec.MXFP4 and bool((blocks[:, 0] > LARGEST_EXPONENT).any())
    for at in block.scales:  # float16, not finite where all bits of the exponent are set
        bad = bad or bool(((blocks[:, at + 1] & 0x7C) == 0x7C).any())
    if bad:
        raise CheckpointError(f"{name} holds values that are not finite (NaN or infinity): the checkpoint is damaged")
