"""Dense feed-forward blocks whose gates, ups and downs are three matrices in a GGUF file, as the file has them.

Each streams by its own rows, so h of all neurons of the layer is kept until rows of down come. These are summed as
bundles of a pack are, so a result has the bits that the pack of the file gives. Nothing is drafted with resident rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flashrt.budget.working_set import UP_ROWS
from flashrt.model.ffn.base import FfnBlock, FfnKind, Take, Tokens
from flashrt.model.workspace import Tensor, Workspace
from flashrt.storage.layout import TensorLayout
from flashrt_kernels.ffn import RoutedTokens
from flashrt_kernels.rows import MATRIX_ROWS, row_bytes


class MatricesBlock(FfnBlock):
    """All neurons, in their order; those called `name` of the layer."""

    def __init__(self, work: Workspace, i: int, name: str = "ffn") -> None:
        super().__init__(work, i)
        *self._along, self._down = work.layout.neurons(f"{i}.{name}")

    @property
    def tensors(self) -> Sequence[str]:
        return [tensor.name for tensor in (*self._along, self._down)]

    @property
    def runs(self) -> int:
        """Experts, or one."""
        return self._down.runs

    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        self.add(x, y, wide=True)

    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        self.add(x, y, wide=False)

    def add(
        self,
        x: Tensor,
        y: Tensor,
        wide: bool,
        routed: RoutedTokens | None = None,
        run: int = 0,
        take: Take | None = None,
    ) -> None:
        """y += one run of neurons of x, for the tokens `routed` (None: all); `take` brings its weights in order."""
        take = take or self._stream
        if routed is not None:
            given = self.work.view("routed", len(routed.tokens), x.shape[1])
            x = np.take(x, routed.tokens, axis=0, out=given, mode="clip")
        h = self._hidden(x, wide, run, take)
        if routed is not None:
            h *= routed.factors[:, None]
        self._add_down(h, y, wide, take, None if routed is None else routed.tokens)

    def _stream(self, tensor: TensorLayout) -> Iterable[tuple[int, Tensor]]:
        return self.weights.runs(tensor.name)

    def _hidden(self, x: Tensor, wide: bool, run: int, take: Take) -> Tensor:
        """h of all neurons of a run, float32 [T, neurons]."""
        work, activation = self.work, self.ffn.activation
        *gates, up = self._along
        h = work.view("hidden", len(x), up.rows)
        of_run = slice(run * up.rows, (run + 1) * up.rows)
        up_bias = None if self.bias is None else self.bias[of_run]
        gate_bias = None if self.gate_bias is None else self.gate_bias[of_run]
        for tensor in gates:
            for first, rows, bundles in self._rows(tensor, take, tensor.rows):
                self._multiply(x, tensor, bundles, h[:, first : first + rows], gate_bias, first, wide)
        most = max(work.buffers["up"].size // len(x), UP_ROWS)  # few tokens have room for more
        for first, rows, bundles in self._rows(up, take, most if gates else up.rows):
            own = h[:, first : first + rows]
            if not gates:
                self._multiply(x, up, bundles, own, up_bias, first, wide)
                work.ops.activate(own, None, activation)
                continue
            ups = work.view("up", len(x), rows)
            self._multiply(x, up, bundles, ups, up_bias, first, wide)
            work.ops.activate(own, ups, activation)
        return h

    def _rows(self, tensor: TensorLayout, take: Take, most: int) -> Iterable[tuple[int, int, Tensor]]:
        """The first row of some bundles, how many they have, `most` at most, and the bundles."""
        step = (tensor.rows if most >= tensor.rows else most // UP_ROWS * UP_ROWS) // MATRIX_ROWS
        for first, bundles in take(tensor):
            for begin in range(0, len(bundles), step):
                part, row = bundles[begin : begin + step], (first + begin) * MATRIX_ROWS
                yield row, min(len(part) * MATRIX_ROWS, tensor.rows - row), part

    def _multiply(
        self, x: Tensor, tensor: TensorLayout, bundles: Tensor, out: Tensor, bias: Tensor, first: int, wide: bool
    ) -> None:
        share = None if bias is None else bias[first : first + out.shape[1]]
        self.work.multiply(x, bundles, tensor.codec, out, 0, out.shape[1], share, wide)

    def _add_down(self, h: Tensor, y: Tensor, wide: bool, take: Take, tokens: Tensor | None) -> None:
        """y += down of h."""
        work, down = self.work, self._down
        size = row_bytes(down.codec, down.columns)
        for first, bundles in take(down):
            row0 = first * MATRIX_ROWS
            rows = bundles.reshape(-1, size)[: down.rows - row0]
            form = rows, down.codec, down.summed, y, row0, tokens
            if wide:
                work.ops.gemm_linear_add(h, *form, work.scratch)
            else:
                work.ops.linear_add(h, *form)


class MatricesKind(FfnKind):
    """Every layer without a router whose neurons are matrices in a file."""

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return not work.spec.layers[i].ffn.experts and f"{i}.ffn:up" in work.layout.tensors

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        self.blocks = {i: MatricesBlock(work, i) for i in layers}
