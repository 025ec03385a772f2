"""What the operations of a feed-forward block take together.

Array is a backend's: numpy arrays for `cpu`, torch tensors for `torch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from flashrt_kernels.rows import Codec, NeuronCodecs

Array = TypeVar("Array")


@dataclass(frozen=True, slots=True)
class FfnWeights(Generic[Array]):
    """Neurons of a feed-forward block: h = act(gate·x + gate_bias) * (up·x + up_bias), or act(up·x + up_bias) ungated.

    Nothing is checked here: the operations check what they are given.
    """

    bundles: Array  # uint8 [n, bytes] of `flashrt_kernels.rows`: neurons, or groups of them
    codec: Codec | NeuronCodecs  # of all rows, or of each
    activation: str  # a name of `flashrt_kernels.activations`
    gated: bool
    up_bias: Array | None = None  # float32, of the neurons that take part, in their order
    gate_bias: Array | None = None  # likewise, only when gated

    @property
    def codecs(self) -> NeuronCodecs:
        """Those of gate, up and down."""
        if isinstance(self.codec, NeuronCodecs):
            return self.codec
        return NeuronCodecs(self.codec if self.gated else None, self.codec, self.codec)


@dataclass(frozen=True, slots=True)
class RoutedTokens(Generic[Array]):
    """The tokens of a pass that a router sent to an expert."""

    tokens: Array  # int32 [m]: rows of x and y, each at most once
    factors: Array  # float32 [m]: what the router multiplies each one's h by
