"""Dense feed-forward blocks, of which leading blocks of neurons are pinned and the rest streams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashrt.model.ffn.base import FfnBlock, FfnKind, Take, Tokens
from flashrt.model.workspace import WIDE_NEURONS, Tensor, Workspace
from flashrt_kernels.ffn import FfnWeights, RoutedTokens


class DenseBlock(FfnBlock):
    """All neurons, in their order; those of tensor `name` of the layer."""

    mixes = True

    def __init__(self, work: Workspace, i: int, name: str = "ffn") -> None:
        super().__init__(work, i)
        self.tensor = work.layout.tensors[f"{i}.{name}"]
        codec = self.tensor.codecs or self.tensor.codec
        self.form = codec, self.ffn.activation, self.ffn.gated  # of a bundle, as kernels take it

    @property
    def tensors(self) -> Sequence[str]:
        return (self.tensor.name,)

    @property
    def runs(self) -> int:
        """Experts, or one."""
        return self.tensor.runs

    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        self.add(x, y, wide=True)

    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        self.add(x, y, wide=False)

    def mix(self, x: Tensor, y: Tensor, wide: int) -> None:
        for first, bundles in self.weights.runs(self.tensor.name):
            self.wide(x[:wide], y[:wide], first, bundles)
            self.work.ops.glu(x[wide:], self.neurons(first, bundles), y[wide:])

    def add(
        self,
        x: Tensor,
        y: Tensor,
        wide: bool,
        routed: RoutedTokens | None = None,
        run: int = 0,
        take: Take | None = None,
    ) -> None:
        """y += one run of neurons of x, for the tokens `routed` (None: all); `take` brings its bundles in order."""
        for first, bundles in self.weights.runs(self.tensor.name) if take is None else take(self.tensor):
            at = run * self.tensor.run_bundles + first  # among the bundles of all experts, as their biases lie
            if wide:
                self.wide(x, y, at, bundles, routed)
            else:
                self.work.ops.glu(x, self.neurons(at, bundles), y, routed)

    def draft(self, x: Tensor, y: Tensor) -> None:
        for first, bundles in self.weights.pinned_of(self.tensor):
            self.work.ops.glu(x, self.neurons(first, bundles), y)

    def wide(
        self,
        x: Tensor,
        y: Tensor,
        first: int,
        bundles: Tensor,
        routed: RoutedTokens | None = None,
        usage: Tensor | None = None,
    ) -> None:
        """y += bundles of x from `first` on, for many tokens; see `ops.gemm_glu`.

        A call keeps the activations of all its neurons: long runs are cut to bound that.
        """
        step = max(WIDE_NEURONS // self.tensor.group, 1)
        for begin in range(0, len(bundles), step):
            part = self.neurons(first + begin, bundles[begin : begin + step])
            own = None if usage is None else usage[begin : begin + step]
            self.work.ops.gemm_glu(x, part, y, routed, self.work.scratch, usage=own)

    def neurons(self, first: int, bundles: Tensor) -> FfnWeights:
        """Bundles from `first` on, as kernels take them."""
        return FfnWeights(bundles, *self.form, *self.biases_of(slice(first, first + len(bundles))))

    def biases_of(self, bundles: slice | np.ndarray) -> tuple[Tensor | None, Tensor | None]:
        """Biases of up and gate of the neurons of some bundles, where there are any."""
        group = self.tensor.group
        up, gate = (
            None if bias is None else bias.reshape(-1, group)[bundles].reshape(-1)
            for bias in (self.bias, self.gate_bias)
        )
        return up, gate


class DenseKind(FfnKind):
    """Every layer that has one run of neurons."""

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return not work.spec.layers[i].ffn.experts and f"{i}.ffn" in work.layout.tensors

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        self.blocks = {i: DenseBlock(work, i) for i in layers}
