"""Layer inputs: what each layer is given of a token beside the residual stream (Gemma's per-layer embeddings).

A token has a row of a table, as wide as all layers need. It is read by itself, so the table need not be in memory. A
projection of the token's embedding is added to it. Each layer multiplies its share by a gate of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashrt.budget.working_set import INPUT_ROWS
from flashrt.model.workspace import Tensor, Wide, Workspace

_HALF = 0.5**0.5  # of two parts of the same size, so that their sum has it too


class LayerInputs:
    """Computes them for the rows of a pass, in the buffers of `work`."""

    def __init__(self, work: Workspace) -> None:
        self.work, spec = work, work.spec
        self._width, self._columns = spec.layer_inputs, len(spec.layers) * spec.layer_inputs

    def begin(self, tokens: Sequence[int], x: Tensor, wide: Wide) -> None:
        """Prepare those of all layers, of tokens whose embeddings are x, float32 [T, hidden]."""
        work, spec = self.work, self.work.spec
        inputs = work.view("inputs", len(x), self._columns)
        work.linear("inputs.project", x, inputs, wide)
        inputs *= spec.hidden**-0.5
        shares = inputs.reshape(-1, self._width)
        work.ops.rms_norm(shares, work.weights.vector("norm.inputs"), spec.norm_eps, shares)
        for begin in range(0, len(x), INPUT_ROWS):
            part = inputs[begin : begin + INPUT_ROWS]
            rows = work.view("input_rows", len(part), self._columns)
            work.lookup("inputs.embed", tokens[begin : begin + INPUT_ROWS], rows)
            rows *= spec.layer_input_scale
            part += rows
            part *= _HALF

    def add(self, i: int, x: Tensor, wide: Wide) -> None:
        """x += what layer `i` makes of its share, x float32 [T, hidden]."""
        work, count = self.work, len(x)
        gate, y = work.view("input_gate", count, self._width), work.view("y", count, work.spec.hidden)
        own = work.view("inputs", count, self._columns)[:, i * self._width : (i + 1) * self._width]
        work.linear(f"{i}.input_gate", x, gate, wide)
        work.ops.activate(gate, own, work.spec.layers[i].ffn.activation)
        work.linear(f"{i}.input_out", gate, y, wide)
        work.norm(f"{i}.norm.input_post", y, y)
        x += y
