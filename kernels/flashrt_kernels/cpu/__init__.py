"""The kernels on numpy arrays, in C++: AVX-512, AVX2 or plain code, chosen at run time.

The extension checks shape, dtype and layout of what it is given. Arrays are float32 unless said otherwise, contiguous
in their last dimension; results go into arrays of the caller's. The package imports neither torch nor anything of
flashrt.

A token's result depends neither on the tokens beside it, nor on the number of threads, nor on how rows or neurons are
spread over calls (ascending; neurons in multiples of 128).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt_kernels.activations import CLAMPED_SWIGLU, parse
from flashrt_kernels.cpu import _cpu
from flashrt_kernels.cpu.recurrent import delta_rule, delta_rule_scratch_bytes, rms_norm_gated, sigmoid_gate
from flashrt_kernels.cpu.sparse import (
    attention_list,
    attention_list_scratch_bytes,
    label_append,
    select,
    select_scratch_bytes,
)
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import Codec

__all__ = [
    "activate",
    "attend_page",
    "attention",
    "attention_list",
    "attention_list_scratch_bytes",
    "attention_scratch_bytes",
    "attention_state_width",
    "available_isas",
    "delta_rule",
    "delta_rule_scratch_bytes",
    "dequantize",
    "down",
    "force_isa",
    "gate_up",
    "gate_up_scratch_bytes",
    "gemm_down",
    "gemm_gate_up",
    "gemm_glu",
    "gemm_linear",
    "gemm_linear_add",
    "gemm_scratch_bytes",
    "glu",
    "isa",
    "kv_append",
    "label_append",
    "layer_norm",
    "linear",
    "linear_add",
    "linear_by_head",
    "quantize",
    "read_bandwidth",
    "reserve",
    "reserve_groups",
    "rms_norm",
    "rms_norm_gated",
    "rope",
    "select",
    "select_scratch_bytes",
    "set_threads",
    "sigmoid_gate",
    "softcap",
    "threads",
]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_CODECS = {codec: number for number, codec in enumerate(Codec)}  # those of codec.h
_FUNCTIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, CLAMPED_SWIGLU: 5}


def _codec(codec: Codec) -> int:
    number = _CODECS.get(codec)
    if number is None:
        raise ValueError(f"codec: expected a Codec, found {codec!r}")
    return number


def _activation(activation: str, gated: bool) -> tuple[int, float, float]:
    found = parse(activation)
    if not (gated or found.gate_only):
        raise ValueError(f"activation: {activation} is that of gated neurons")
    return _FUNCTIONS[found.function], found.threshold, found.limit


def _ffn(weights: FfnWeights[Any]) -> tuple[Any, tuple[int, int, int, int], tuple[int, float, float], bool]:
    codecs = weights.codecs
    gate = codecs.up if codecs.gate is None else codecs.gate
    numbers = _codec(gate), _codec(codecs.up), _codec(codecs.down), codecs.group
    return weights.bundles, numbers, _activation(weights.activation, weights.gated), weights.gated


def _routed(routed: RoutedTokens[Any] | None) -> tuple[Any, Any]:
    return (None, None) if routed is None else (routed.tokens, routed.factors)


def set_threads(n: int) -> None:
    """Threads that share each operation from now on, the caller's included."""
    if n < 1:
        raise ValueError(f"n: expected a positive number of threads, found {n}")
    _cpu.set_threads(n)


def threads() -> int:
    """Threads that share each operation."""
    return int(_cpu.threads())


def isa() -> str:
    """The instruction set in use: 'amx', 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
    return str(_cpu.isa())


def available_isas() -> list[str]:
    """The instruction sets that this machine can run, slowest first."""
    return list(_cpu.available_isas())


def force_isa(name: str | None) -> None:
    """Uses the named instruction set instead of the best one (None: the best). For tests and comparisons."""
    if not _cpu.force_isa(name):
        raise ValueError(f"name: expected one of {', '.join(available_isas())}, found {name!r}")


def reserve(k: int) -> int:
    """Allocates what `linear` and `glu` keep per calling thread for rows of up to `k`; the bytes.

    Without it the first call allocates, and later calls do only when `k` grows.
    """
    return int(_cpu.reserve(k))


def reserve_groups() -> int:
    """Allocates what `glu` keeps besides for bundles of more than one neuron; the bytes."""
    return int(_cpu.reserve_groups())


def linear(
    x: Floats, bundles: Bytes, codec: Codec, out: Floats, row0: int, rows: int, bias: Floats | None = None
) -> None:
    """out[b, row0 + r] = x[b] · W[r] + bias[r] for r < rows, for a few tokens.

    x [B, K] and out [B, >= row0 + rows] may have a row stride. bundles uint8 [n, bytes]: eight rows each, with any
    stride between bundles. bias [rows].
    """
    _cpu.linear(x, bundles, _codec(codec), out, row0, rows, bias)


def linear_by_head(x: Floats, bundles: Bytes, codec: Codec, out: Floats, row0: int, rows: int) -> None:
    """out[b, h] = x[b, h] · W[h N : (h + 1) N] for a few tokens, of what rows row0 to row0 + rows of W give.

    x [B, H, K], K of at most `WIDEST_HEAD`, and out [B, H, N] may have strides in the first two dimensions. bundles
    uint8 [n, bytes] begin with row0. N, row0 and rows are multiples of eight. The bits are those of `linear` head by
    head.
    """
    _cpu.linear_by_head(x, bundles, _codec(codec), out, row0, rows)


def gemm_linear(
    x: Floats,
    bundles: Bytes,
    codec: Codec,
    out: Floats,
    row0: int,
    rows: int,
    bias: Floats | None = None,
    scratch: Bytes | None = None,
) -> None:
    """`linear` for many tokens. Where the machine multiplies bfloat16, x and weights are rounded to it, except in F32.

    scratch uint8 [gemm_scratch_bytes(B, K)]; None allocates.
    """
    _cpu.gemm_linear(x, bundles, _codec(codec), out, row0, rows, bias, scratch)


def gemm_scratch_bytes(tokens: int, k: int, neurons: int = 0) -> int:
    """Scratch of `gemm_linear`, or of `gemm_glu` on `neurons` neurons, with the present number of threads."""
    return int(_cpu.gemm_scratch_bytes(tokens, k, neurons))


def linear_add(
    x: Floats,
    rows: Bytes,
    codec: Codec,
    group: int,
    y: Floats,
    row0: int,
    tokens: NDArray[np.int32] | None = None,
) -> None:
    """y[tokens[b], row0 + r] += x[b] · rows[r], for a few tokens, `group` numbers after the other.

    x [B, K] and y [any, >= row0 + n] may have a row stride and must not share memory. rows uint8 [n, bytes], of a kept
    codec, may have any stride. tokens int32 [B], each at most once (None: all). The bits are those of `glu` on bundles
    of `group` neurons.
    """
    _cpu.linear_add(x, rows, _codec(codec), group, y, row0, tokens)


def gemm_linear_add(
    x: Floats,
    rows: Bytes,
    codec: Codec,
    group: int,
    y: Floats,
    row0: int,
    tokens: NDArray[np.int32] | None = None,
    scratch: Bytes | None = None,
) -> None:
    """`linear_add` for many tokens, with the bits of `gemm_glu`. scratch uint8 [gemm_scratch_bytes(B, K)]."""
    _cpu.gemm_linear_add(x, rows, _codec(codec), group, y, row0, tokens, scratch)


def glu(
    x: Floats,
    weights: FfnWeights[Any],
    y: Floats,
    routed: RoutedTokens[Any] | None = None,
    slots: NDArray[np.int32] | None = None,
    streamed_bundles: Sequence[Bytes] | None = None,
    usage: Floats | None = None,
) -> None:
    """y[b] += h * down for each neuron in ascending order, for a few tokens.

    h is that of `FfnWeights`, multiplied by the factors of the `routed` tokens where those alone take part. x and y
    [B, K] may have a row stride and must not share memory; bundles may have any stride. slots int32 [s] names the
    bundles that take part, in that order (None: all), wherever rows are kept that are not neighbours: i >= 0 is bundle
    i of the weights, and -1 - i bundle i of the arrays `streamed_bundles` (uint8 [n, bytes] each), numbered one after
    the other, which have equally many, the last possibly fewer. Biases [s] are of those that take part; usage [s] +=
    |h|, summed over the tokens.
    """
    tokens, factors = _routed(routed)
    biases = weights.up_bias, weights.gate_bias
    _cpu.glu(x, *_ffn(weights), y, *biases, tokens, factors, slots, streamed_bundles, usage)


def gemm_glu(
    x: Floats,
    weights: FfnWeights[Any],
    y: Floats,
    routed: RoutedTokens[Any] | None = None,
    scratch: Bytes | None = None,
    usage: Floats | None = None,
) -> None:
    """`glu` for many tokens, rounding like `gemm_linear`. scratch uint8 [gemm_scratch_bytes(tokens, K, n)]."""
    tokens, factors = _routed(routed)
    _cpu.gemm_glu(x, *_ffn(weights), y, weights.up_bias, weights.gate_bias, tokens, factors, scratch, usage)


def gate_up(
    x: Floats,
    groups: Bytes,
    first: int,
    fine: int,
    order: NDArray[np.int32],
    norms: Floats,
    ratio: Floats,
    sums: Floats,
    coarse_from: float,
    fine_from: float,
) -> tuple[int, int]:
    """sums[b] += gate and up of x[b], for the channels that count, for a few tokens.

    x [B, K]; groups uint8 [n, group_bytes] of `flashrt_kernels.channels`, of which `first` is the first; order int32
    [places] names the channel at each place (-1: none). A channel c takes part from |x_c| * norms[c] >= coarse_from on,
    with its fine half, where it has one, from fine_from on. ratio [C]; sums [B, C], in units of the columns' scales.
    Groups in ascending order, in any number of calls, give the same bits. Returns how many coarse and fine halves of
    channels took part, summed over the tokens.
    """
    coarse, halves = _cpu.gate_up(x, groups, first, fine, order, norms, ratio, sums, coarse_from, fine_from)
    return int(coarse), int(halves)


def gemm_gate_up(
    x: Floats,
    groups: Bytes,
    first: int,
    fine: int,
    order: NDArray[np.int32],
    ratio: Floats,
    sums: Floats,
    scratch: Bytes | None = None,
) -> None:
    """`gate_up` for many tokens, of all channels, rounding like `gemm_linear`.

    scratch uint8 [gate_up_scratch_bytes(B, n)]; None allocates.
    """
    _cpu.gemm_gate_up(x, groups, first, fine, order, ratio, sums, scratch)


def gate_up_scratch_bytes(tokens: int, groups: int) -> int:
    """Scratch of `gemm_gate_up` on `groups` groups, with the present number of threads."""
    return int(_cpu.gate_up_scratch_bytes(tokens, groups))


def down(
    sums: Floats,
    scale: Floats,
    norms: Floats,
    activation: str,
    gated: bool,
    up_bias: Floats | None,
    rows: Bytes,
    codec: Codec,
    first: int,
    y: Floats,
    threshold: float,
) -> int:
    """y[b] += h * row, for the neurons that count, for a few tokens; how many that were, summed over the tokens.

    h = act(scale * gate) * (scale * up), or act(scale * up + up_bias) when not gated, from sums [B, C] of `gate_up`.
    norms [neurons]: a neuron takes part from |h| * norm >= threshold on. rows uint8 [n, bytes] are the encoded rows of
    down, of neurons `first` (a multiple of 512) and following. Calls cut at multiples of 512 give the same bits.
    """
    number = _activation(activation, gated)
    return int(_cpu.down(sums, scale, norms, number, gated, up_bias, rows, _codec(codec), first, y, threshold))


def gemm_down(
    sums: Floats,
    scale: Floats,
    norms: Floats,
    activation: str,
    gated: bool,
    up_bias: Floats | None,
    rows: Bytes,
    codec: Codec,
    first: int,
    y: Floats,
    scratch: Bytes | None = None,
) -> None:
    """`down` for many tokens, of all neurons. scratch uint8 [gemm_scratch_bytes(B, K, n)]; None allocates."""
    number = _activation(activation, gated)
    _cpu.gemm_down(sums, scale, norms, number, gated, up_bias, rows, _codec(codec), first, y, scratch)


def rms_norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight over rows of x [N, K]; row strides allowed, out may be x."""
    _cpu.rms_norm(x, weight, eps, out)


def layer_norm(x: Floats, weight: Floats, bias: Floats | None, eps: float, out: Floats) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over rows of x [N, K]; out may be x."""
    _cpu.layer_norm(x, weight, bias, eps, out)


def softcap(x: Floats, cap: float) -> None:
    """x = cap * tanh(x / cap) in place, by numpy: once a token, over its logits."""
    np.divide(x, np.float32(cap), out=x)
    np.tanh(x, out=x)
    np.multiply(x, np.float32(cap), out=x)


def activate(gate: Floats, up: Floats | None, activation: str) -> None:
    """gate = act(gate) * up in place, gate and up [N, K], up None for ones; row strides allowed."""
    _cpu.activate(gate, up, _activation(activation, up is not None))


def rope(x: Floats, cos: Floats, sin: Floats) -> None:
    """Rotates the halves of each head of x [B, heads, D] in place; cos and sin [B, D / 2].

    Strides are free in the first two dimensions.
    """
    _cpu.rope(x, cos, sin)


def kv_append(k: Floats, v: Floats | None, kv: NDArray[Any], start: int) -> None:
    """Writes k and v [B, KVH, D] at positions start.. of kv [KVH, context, *pair] (`flashrt_kernels.kv`).

    k and v may have a stride in the first dimension. v is None where kv holds keys only.
    """
    _cpu.kv_append(k, v, kv, start)


def attention(
    q: Floats,
    kv: NDArray[Any],
    start: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    out: Floats,
    scratch: Bytes | None = None,
    parents: NDArray[np.int32] | None = None,
    state: Floats | None = None,
    sinks: Floats | None = None,
    wide: bool = False,
) -> None:
    """Causal attention of tokens at positions start.. over kv, which already holds their keys and values.

    q [B, H, D], stride allowed in the first dimension; kv [KVH, context, *pair]; out [B, H * V], of which V, at most D,
    are the first numbers of the values. Token b at position p = start + b attends to max(0, p - window + 1)..p. scratch
    uint8 [attention_scratch_bytes(...)]; None allocates. parents int32 [B], at most 16, makes the tokens a tree: token
    b follows token parents[b] < b, or with -1 the sequence before start. Its keys and values stay at start + b, its
    position is start plus the number of tokens that it follows; of the tree it attends to these and itself, with the
    bits that they would give in a row.
    state [B, H, attention_state_width(V)], stride allowed in the first dimension, holds what `attend_page` has gathered
    of positions before those of kv; there can be no window then.
    sinks [H] are scores, as they are, that each head has beside those of its keys, and whose values are zero; a state
    has them already. wide: the tokens are part of a pass of many, which may round otherwise than one of few (by AMX:
    queries and weights to 16 bits), but alike however it is cut. A tree is no such part.
    """
    if window is not None and (window < 1 or state is not None):
        expected = "a positive number of tokens or None" if state is None else "None beside a state"
        raise ValueError(f"window: expected {expected}, found {window}")
    _cpu.attention(q, kv, start, window or 0, scale, softcap or 0.0, out, scratch, parents, state, sinks, wide)


def attend_page(
    q: Floats,
    page: NDArray[Any],
    scale: float,
    softcap: float | None,
    state: Floats,
    first: bool,
    scratch: Bytes | None = None,
    sinks: Floats | None = None,
    wide: bool = False,
) -> None:
    """Takes positions that all tokens see, page [KVH, n, *pair], into state [B, H, attention_state_width(V)].

    Pages come in the order of their positions, all but the last a multiple of 256 long; before the `first`, nothing is
    in state, or the sinks. q and state may have strides in the first dimension, scratch is that of `attention`. The
    attention that then begins from state gives the bits of one over everything.
    """
    _cpu.attend_page(q, page, scale, softcap or 0.0, state, first, scratch, sinks, wide)


def attention_state_width(values: int) -> int:
    """Numbers of the running softmax of one query with so many numbers of a value."""
    return int(_cpu.attention_state_width(values))


def attention_scratch_bytes(tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """Scratch of `attention`, whatever the context, with the present number of threads."""
    return int(_cpu.attention_scratch_bytes(tokens, heads, kv_heads, dim))


def quantize(weights: Floats, codec: Codec, out: Bytes, importance: Floats | None = None) -> None:
    """Encodes weights [n, k] as rows, out uint8 [n, row_bytes] (row stride allowed).

    importance [k] says what each column's squared error counts (int4; None: all the same).
    """
    _cpu.quantize(weights, _codec(codec), importance, out)


def dequantize(rows: Bytes, codec: Codec, k: int, out: Floats) -> None:
    """out [n, k] = the weights of rows uint8 [n, >= row_bytes] (row strides allowed)."""
    _cpu.dequantize(rows, _codec(codec), k, out)


def read_bandwidth(data: Bytes) -> int:
    """Reads every byte of data uint8 [n] with all threads, and does nothing else: the ceiling to time against."""
    return int(_cpu.read_all(data))
