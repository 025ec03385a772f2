"""What the neurons of a layer did on calibration text: what predictors are fitted to and neurons are ordered by."""

from __future__ import annotations

import numpy as np

Array = np.ndarray

CHUNK = 512  # tokens looked at together


class Samples:
    """Inputs of one layer's FFN, and what each of its neurons contributed, for up to `tokens` tokens.

    A neuron's *importance* for a token is |h| times the length of its down row: how far its absence would move the
    result. Inputs are kept as float32, importance as bfloat16, in `nbytes` bytes that are taken at once.
    """

    def __init__(self, tokens: int, hidden: int, down_norms: Array) -> None:
        """`down_norms` (float32 [neurons]) are the lengths of the down rows."""
        self.count, self.neurons = 0, len(down_norms)
        self._norms = down_norms
        self._inputs = np.zeros((tokens, hidden), np.float32)
        self._importance = np.zeros((tokens, len(down_norms)), np.uint16)
        self.nbytes = self._inputs.nbytes + self._importance.nbytes

    def add(self, inputs: Array, h: Array) -> None:
        """Keep `inputs` (float32 [n, hidden]) and `h` (float32 [n, neurons]), in the order of the text.

        Raises ValueError when there is no room: no token is ever dropped.
        """
        end = self.count + len(inputs)
        if end > len(self._inputs):
            raise ValueError(f"there is room for {len(self._inputs)} tokens, and {end} have come")
        self._inputs[self.count : end] = inputs
        self._importance[self.count : end] = to_bfloat16(np.abs(h) * self._norms)
        self.count = end

    @property
    def inputs(self) -> Array:
        """float32 [count, hidden]."""
        return self._inputs[: self.count]

    def importance(self, tokens: Array | slice) -> Array:
        """float32 [tokens, neurons]."""
        return from_bfloat16(self._importance[: self.count][tokens])

    def active(self, tokens: Array | slice) -> Array:
        """Which neurons are not zero, bool [tokens, neurons]."""
        return self._importance[: self.count][tokens] > 0

    def frequency(self) -> Array:
        """Share of the tokens for which each neuron is active, float64 [neurons]."""
        chunks = (self.active(slice(begin, begin + CHUNK)) for begin in range(0, self.count, CHUNK))
        return sum((chunk.sum(axis=0) for chunk in chunks), np.zeros(self.neurons)) / max(self.count, 1)


def to_bfloat16(values: Array) -> Array:
    """The bits of float32 values >= 0, rounded up where they do not fit: what is not zero stays so."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0xFFFF) >> 16).astype(np.uint16)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)
