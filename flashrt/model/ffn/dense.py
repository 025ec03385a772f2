"""Dense feed-forward blocks, of which leading blocks of neurons are pinned and the rest streams."""

from __future__ import annotations

from collections.abc import Sequence

from flashrt.model.ffn.base import FfnBlock, FfnKind, Tokens
from flashrt.model.workspace import WIDE_NEURONS, Tensor, Workspace
from flashrt_kernels.ffn import FfnWeights, RoutedTokens


class DenseBlock(FfnBlock):
    """All neurons, in their order."""

    def __init__(self, work: Workspace, i: int) -> None:
        super().__init__(work, i)
        self.tensor = work.layout.tensors[f"{i}.ffn"]
        self.form = self.tensor.codec, self.ffn.activation, self.ffn.gated  # of a bundle, as kernels take it

    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        for first, bundles in self.weights.runs(self.tensor.name):
            self.wide(x, y, first, bundles)

    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        for first, bundles in self.weights.runs(self.tensor.name):
            self.work.ops.glu(x, self.neurons(first, bundles), y)

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
        """y += neurons of x from `first` on, for many tokens; see `ops.gemm_glu`.

        A call keeps the activations of all its neurons: long runs are cut to bound that.
        """
        for begin in range(0, len(bundles), WIDE_NEURONS):
            part = self.neurons(first + begin, bundles[begin : begin + WIDE_NEURONS])
            own = None if usage is None else usage[begin : begin + WIDE_NEURONS]
            self.work.ops.gemm_glu(x, part, y, routed, self.work.scratch, usage=own)

    def neurons(self, first: int, bundles: Tensor) -> FfnWeights:
        """Neurons from `first` on, as kernels take them."""
        bias = None if self.bias is None else self.bias[first : first + len(bundles)]
        return FfnWeights(bundles, *self.form, bias)


class DenseKind(FfnKind):
    """Every layer that has one run of neurons."""

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return not work.spec.layers[i].ffn.experts and f"{i}.ffn" in work.layout.tensors

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        self.blocks = {i: DenseBlock(work, i) for i in layers}
