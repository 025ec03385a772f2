"""What every part of a decoder computes with: the buffers of a pass, and products and norms of named weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashrt.cache.weights import Weights
from flashrt.spec import DeltaNet, Mixer, ModelSpec
from flashrt.storage.layout import PackLayout, TensorLayout
from flashrt_kernels.channels import channel_groups
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes

WIDE_NEURONS = 512  # neurons of one wide call; a multiple of 128 (see `flashrt_kernels.cpu`)

Tensor = Any  # an array of the backend: numpy for 'cpu', torch for 'torch'
Wide = bool | int  # whether the kernels for many tokens compute rows: all of them, none, or so many of the leading ones


def leading(wide: Wide, rows: int) -> int:
    """How many of `rows` the kernels for many tokens compute: the first ones."""
    return rows * wide if isinstance(wide, bool) else wide


class Workspace:
    """`buffers` are flat, sized by `budget.working_set`; `scratch` is what kernels take beside them."""

    def __init__(self, weights: Weights, buffers: Mapping[str, Tensor], scratch: Tensor) -> None:
        self.weights, self.buffers, self.scratch = weights, buffers, scratch
        self.spec, self.layout = weights.spec, weights.layout
        self.device, self.ops = weights.device, weights.device.ops

    def view(self, name: str, rows: int, width: int) -> Tensor:
        """The leading part of a buffer as a contiguous [rows, width] matrix."""
        return self.buffers[name][: rows * width].reshape(rows, width)

    def lookup(self, name: str, ids: Sequence[int], out: Tensor) -> None:
        """Rows `ids` of a matrix, decoded into `out` (float32 [T, columns])."""
        tensor = self.layout.tensors[name]
        encoded = self.view("encoded", len(ids), row_bytes(tensor.codec, tensor.columns))
        self.weights.rows(name, ids, encoded)
        self.ops.dequantize(encoded, tensor.codec, tensor.columns, out)

    def linear(
        self,
        name: str,
        x: Tensor,
        out: Tensor,
        wide: Wide,
        bias: str | None = None,
        rows: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """out = x W^T + bias; only the rows between the pairs `rows`, which are whole bundles, where they are given."""
        vector = None if bias is None else self.weights.vector(bias)
        for tensor in self.layout.parts(name):
            if tensor.turned is not None:
                self._turned(tensor, x, out, wide, vector)
                continue
            last = tensor.row0 + tensor.rows
            for first, bundles in self.weights.runs(tensor.name):
                row0 = tensor.row0 + first * MATRIX_ROWS
                for begin, end in rows or [(0, last)]:
                    begin, end = max(begin, row0), min(end, row0 + len(bundles) * MATRIX_ROWS, last)
                    if begin < end:
                        share = None if vector is None else vector[begin:end]
                        part = bundles[(begin - row0) // MATRIX_ROWS :]
                        self.multiply(x, part, tensor.codec, out, begin, end - begin, share, wide)

    def _turned(self, tensor: TensorLayout, x: Tensor, out: Tensor, wide: Wide, bias: Tensor | None) -> None:
        """`linear` of rows that a file has in another order: products are put in order, a few tokens at a time."""
        assert tensor.turned is not None
        begin, end = tensor.row0, tensor.row0 + tensor.rows
        for first, bundles in self.weights.runs(tensor.name):
            row0 = begin + first * MATRIX_ROWS
            rows = min(len(bundles) * MATRIX_ROWS, end - row0)
            self.multiply(x, bundles, tensor.codec, out, row0, rows, None, wide)
        places = tensor.turned.places(tensor.rows)
        for start in range(0, len(out), NARROW_TOKENS):
            part = out[start : start + NARROW_TOKENS, begin:end]
            part[:, places] = part.copy()
            if bias is not None:
                part += bias[begin:end]

    def linear_by_head(self, name: str, x: Tensor, out: Tensor, wide: Wide) -> None:
        """out[:, h] = x[:, h] W_h^T, of a matrix that has the rows of one head after the other, whole bundles each.

        x: float32 [T, heads, K]; out: float32 [T, heads, N]
        """
        tensor, count, many = self.layout.tensors[name], out.shape[2], leading(wide, len(x))
        for first, bundles in self.weights.runs(name):
            row0 = first * MATRIX_ROWS
            last = min(row0 + len(bundles) * MATRIX_ROWS, tensor.rows)
            if many < len(x):
                self.ops.linear_by_head(x[many:], bundles, tensor.codec, out[many:], row0, last - row0)
            if not many:
                continue
            for head in range(row0 // count, -(-last // count)):
                begin, end = max(head * count, row0), min((head + 1) * count, last)
                part = bundles[(begin - row0) // MATRIX_ROWS :]
                place = out[:many, head], begin - head * count, end - begin
                self.ops.gemm_linear(x[:many, head], part, tensor.codec, *place, None, self.scratch)

    def multiply(
        self, x: Tensor, bundles: Tensor, codec: Codec, out: Tensor, row0: int, rows: int, bias: Tensor, wide: Wide
    ) -> None:
        """out[:, row0 : row0 + rows] = x W^T + bias, of `rows` rows in `bundles`."""
        many = leading(wide, len(x))
        if many:
            self.ops.gemm_linear(x[:many], bundles, codec, out[:many], row0, rows, bias, self.scratch)
        if many < len(x):
            self.ops.linear(x[many:], bundles, codec, out[many:], row0, rows, bias)

    def norm(self, name: str, x: Tensor, out: Tensor) -> None:
        """out = norm `name` of x, float32 [T, hidden]."""
        weight = self.weights.vector(name)
        if self.spec.norm == "rms":
            self.ops.rms_norm(x, weight, self.spec.norm_eps, out)
        else:
            bias = self.weights.vector(f"{name}.bias") if self.spec.norm_bias else None
            self.ops.layer_norm(x, weight, bias, self.spec.norm_eps, out)

    def block_input(self, i: int, block: str, x: Tensor, out: Tensor) -> Tensor:
        """What `block` ('attention' or 'ffn') of layer `i` is given of x, float32 [T, hidden]: x, or `out` normed."""
        name = self.spec.input_norm(i, block)
        if name is None:
            return x
        self.norm(name, x, out)
        return out

    def block_output(self, i: int, block: str, y: Tensor) -> None:
        """Make of what a block gives, float32 [T, hidden], what is added to the residual stream, in place."""
        if self.spec.post_norms:
            self.norm(f"{i}.norm.{block}_post", y, y)
        if self.spec.residual_scale != 1.0:
            y *= self.spec.residual_scale


def scratch_bytes(spec: ModelSpec, layout: PackLayout, ops: Any, tokens: int) -> int:
    """Bytes of the kernels' scratch in a pass of at most `tokens` tokens."""
    sizes = [ops.gemm_scratch_bytes(tokens, 2 * spec.hidden if spec.follows else spec.hidden)]
    if spec.layer_inputs:
        sizes.append(ops.gemm_scratch_bytes(tokens, spec.layer_inputs))
    if layout.channel_columns:
        sizes.append(ops.gate_up_scratch_bytes(tokens, channel_groups(spec.hidden)))
    for layer in set(spec.layers):
        neurons = min(max(layer.ffn.neurons, layer.ffn.shared), WIDE_NEURONS)
        sizes += [
            *(ops.gemm_scratch_bytes(tokens, columns) for _, columns in layer.mixer.matrices(spec.hidden).values()),
            ops.gemm_scratch_bytes(tokens, spec.hidden, neurons),
            *_mixer_scratch(layer.mixer, ops, tokens),
        ]
    sizes += [ops.gemm_scratch_bytes(tokens, columns) for columns in {t.columns for t in _downs(layout)}]
    return int(max(sizes))


def _downs(layout: PackLayout) -> list[TensorLayout]:
    """Matrices of neurons in a file whose rows go along the neurons."""
    return [tensor for tensor in layout.tensors.values() if tensor.summed]


def _mixer_scratch(mixer: Mixer, ops: Any, tokens: int) -> list[int]:
    """Bytes of scratch that a mixer takes for passes of 1 to `tokens` tokens."""
    if isinstance(mixer, DeltaNet):
        return [ops.delta_rule_scratch_bytes(mixer.channels, mixer.taps, mixer.key_dim)]
    heads, kv_heads, dim = mixer.heads, mixer.kv_heads, mixer.head_dim
    # A few tokens may take more than many, which are cut into tiles.
    return [ops.attention_scratch_bytes(count, heads, kv_heads, dim) for count in range(1, tokens + 1)]


def reserve(spec: ModelSpec, layout: PackLayout, ops: Any) -> None:
    """Make the kernels take what they keep between calls, before the process is measured."""
    columns = (columns for layer in spec.layers for _, columns in layer.mixer.matrices(spec.hidden).values())
    ops.reserve(max(*columns, 2 * spec.hidden if spec.follows else spec.hidden, spec.layer_inputs))
    if _downs(layout) or any(tensor.group > 1 for tensor in layout.tensors.values()):
        ops.reserve_groups()
