"""The kernels on numpy arrays, in C++: AVX-512, AVX2 or plain code, chosen at run time.

Wrappers check shape, dtype and layout, then call the extension. Arrays are float32 unless said otherwise, contiguous in
their last dimension; results go into arrays of the caller's. The package imports neither torch nor anything of flashrt.

A token's result depends neither on the tokens beside it, nor on the number of threads, nor on how rows or neurons are
spread over calls (ascending; in multiples of 64 neurons for `gemm_glu`).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashrt_kernels.cpu import _cpu
from flashrt_kernels.rows import LONGEST_ROW, MATRIX_ROWS, WIDEST_HEAD, Codec, row_bytes

__all__ = [
    "attention",
    "attention_scratch_bytes",
    "available_isas",
    "dequantize",
    "force_isa",
    "gemm_glu",
    "gemm_linear",
    "gemm_scratch_bytes",
    "glu",
    "isa",
    "kv_append",
    "layer_norm",
    "linear",
    "quantize",
    "read_bandwidth",
    "reserve",
    "rms_norm",
    "rope",
    "set_threads",
    "threads",
]

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]

_CODECS = {Codec.F32: 0, Codec.BF16: 1, Codec.INT8: 2, Codec.INT4: 3}
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3}


def _array(name: str, array: Any, dtype: type, ndim: int) -> None:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: expected a numpy array, found {type(array).__name__}")
    if array.dtype != dtype:
        raise ValueError(f"{name}: expected {np.dtype(dtype).name}, found {array.dtype.name}")
    if array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, found shape {array.shape}")
    if array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        raise ValueError(f"{name}: the last dimension is not contiguous (strides {array.strides})")
    if any(step % array.itemsize or step < 0 for step in array.strides):
        raise ValueError(f"{name}: strides {array.strides} are negative or no multiple of the item size")


def _shape(name: str, array: NDArray[Any], *shape: int | None) -> None:
    """`None` in `shape` accepts any length."""
    if any(want is not None and have != want for have, want in zip(array.shape, shape, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape ({expected}), found {array.shape}")


def _contiguous(name: str, array: NDArray[Any], dims: int) -> None:
    """The last `dims` dimensions lie back to back."""
    step = array.itemsize
    for length, stride in zip(array.shape[::-1][:dims], array.strides[::-1][:dims], strict=True):
        if length > 1 and stride != step:
            raise ValueError(f"{name}: the last {dims} dimensions are not contiguous (strides {array.strides})")
        step *= length


def _writable(name: str, array: NDArray[Any]) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{name}: read-only")


def _vector(name: str, array: Any, length: int, dtype: type = np.float32) -> None:
    if array is not None:
        _array(name, array, dtype, 1)
        _shape(name, array, length)


def _bundles(bundles: Any, codec: Codec, rows: int, k: int) -> int:
    """Checks packed bundles of `rows` rows of `k` weights; the codec's number."""
    if codec not in _CODECS:
        raise ValueError(f"codec: expected a Codec, found {codec!r}")
    if not 0 < k <= LONGEST_ROW:
        raise ValueError(f"x: rows of 1 to {LONGEST_ROW} numbers are supported, found {k}")
    _array("bundles", bundles, np.uint8, 2)
    if bundles.shape[1] < rows * row_bytes(codec, k):
        raise ValueError(
            f"bundles: {rows} rows of {k} weights in {codec.value} take {rows * row_bytes(codec, k)} bytes, "
            f"found {bundles.shape[1]}"
        )
    return _CODECS[codec]


def _scratch(scratch: Any, need: int) -> Bytes:
    if scratch is None:
        return np.empty(need, np.uint8)
    _array("scratch", scratch, np.uint8, 1)
    _writable("scratch", scratch)
    if scratch.size < need:
        raise ValueError(f"scratch: {need} bytes are needed, found {scratch.size}")
    return scratch


def set_threads(n: int) -> None:
    """Threads that share each operation from now on, the caller's included."""
    if n < 1:
        raise ValueError(f"n: expected a positive number of threads, found {n}")
    _cpu.set_threads(n)


def threads() -> int:
    """Threads that share each operation."""
    return int(_cpu.threads())


def isa() -> str:
    """The instruction set in use: 'avx512bf16', 'avx512', 'avx2' or 'scalar'."""
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


def _linear_arguments(
    x: Floats, bundles: Bytes, codec: Codec, out: Floats, row0: int, rows: int, bias: Floats | None
) -> int:
    _array("x", x, np.float32, 2)
    number = _bundles(bundles, codec, MATRIX_ROWS, x.shape[1])
    _array("out", out, np.float32, 2)
    _writable("out", out)
    if out.shape[0] != x.shape[0]:
        raise ValueError(f"out: expected {x.shape[0]} rows as x has, found {out.shape[0]}")
    if not 0 <= rows <= MATRIX_ROWS * bundles.shape[0]:
        raise ValueError(
            f"rows: {bundles.shape[0]} bundles hold {MATRIX_ROWS * bundles.shape[0]} rows, asked for {rows}"
        )
    if row0 < 0 or row0 + rows > out.shape[1]:
        raise ValueError(f"out: {out.shape[1]} columns cannot take rows {row0} to {row0 + rows}")
    _vector("bias", bias, rows)
    return number


def linear(
    x: Floats, bundles: Bytes, codec: Codec, out: Floats, row0: int, rows: int, bias: Floats | None = None
) -> None:
    """out[b, row0 + r] = x[b] · W[r] + bias[r] for r < rows, for a few tokens.

    x [B, K] and out [B, >= row0 + rows] may have a row stride. bundles uint8 [n, bytes]: eight rows each, with any
    stride between bundles. bias [rows].
    """
    number = _linear_arguments(x, bundles, codec, out, row0, rows, bias)
    if x.shape[0] and rows:
        _cpu.linear(x, bundles, number, out, row0, rows, bias)


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
    number = _linear_arguments(x, bundles, codec, out, row0, rows, bias)
    if x.shape[0] and rows:
        memory = _scratch(scratch, gemm_scratch_bytes(x.shape[0], x.shape[1]))
        _cpu.gemm_linear(x, bundles, number, out, row0, rows, bias, memory)


def gemm_scratch_bytes(tokens: int, k: int, neurons: int = 0) -> int:
    """Scratch of `gemm_linear`, or of `gemm_glu` on `neurons` neurons, with the present number of threads."""
    return int(_cpu.gemm_scratch_bytes(tokens, k, neurons))


def _glu_arguments(
    x: Floats,
    bundles: Bytes,
    codec: Codec,
    activation: Activation,
    gated: bool,
    y: Floats,
    up_bias: Floats | None,
    tokens: NDArray[np.int32] | None,
    weights: Floats | None,
) -> tuple[int, int, int]:
    """Checks the arguments; the codec's and the activation's number, and how many tokens take part."""
    _array("x", x, np.float32, 2)
    number = _bundles(bundles, codec, 3 if gated else 2, x.shape[1])
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, found {activation!r}")
    _array("y", y, np.float32, 2)
    _shape("y", y, *x.shape)
    _writable("y", y)
    if np.may_share_memory(x, y):
        raise ValueError("y: shares memory with x")
    if up_bias is not None and gated:
        raise ValueError("up_bias: only ungated neurons have one")
    _vector("up_bias", up_bias, bundles.shape[0])
    taking_part = x.shape[0]
    if tokens is not None:
        _array("tokens", tokens, np.int32, 1)
        chosen = tokens.tolist()
        if chosen and not (min(chosen) >= 0 and max(chosen) < x.shape[0]):
            raise ValueError(f"tokens: expected rows below {x.shape[0]}, found {min(chosen)} to {max(chosen)}")
        if len(set(chosen)) != len(chosen):
            raise ValueError("tokens: a token is named twice")
        taking_part = len(chosen)
    _vector("weights", weights, taking_part)
    return number, _ACTIVATIONS[activation], taking_part


def glu(
    x: Floats,
    bundles: Bytes,
    codec: Codec,
    activation: Activation,
    gated: bool,
    y: Floats,
    up_bias: Floats | None = None,
    tokens: NDArray[np.int32] | None = None,
    weights: Floats | None = None,
) -> None:
    """y[b] += h * down for each neuron in ascending order, for a few tokens.

    h = act(gate·x) * (up·x) with bundles of (gate, up, down) rows; ungated h = act(up·x + up_bias) with (up, down).
    x and y [B, K] may have a row stride and must not share memory. bundles uint8 [n, bytes], any stride. tokens int32
    [m] names the rows of x and y that take part, each at most once; weights [m] (or [B]) multiplies their h.
    """
    number, act, count = _glu_arguments(x, bundles, codec, activation, gated, y, up_bias, tokens, weights)
    if count and bundles.shape[0]:
        _cpu.glu(x, bundles, number, act, gated, y, up_bias, tokens, weights)


def gemm_glu(
    x: Floats,
    bundles: Bytes,
    codec: Codec,
    activation: Activation,
    gated: bool,
    y: Floats,
    up_bias: Floats | None = None,
    tokens: NDArray[np.int32] | None = None,
    weights: Floats | None = None,
    scratch: Bytes | None = None,
) -> None:
    """`glu` for many tokens, rounding like `gemm_linear`. scratch uint8 [gemm_scratch_bytes(tokens, K, n)]."""
    number, act, count = _glu_arguments(x, bundles, codec, activation, gated, y, up_bias, tokens, weights)
    if count and bundles.shape[0]:
        memory = _scratch(scratch, gemm_scratch_bytes(count, x.shape[1], bundles.shape[0]))
        _cpu.gemm_glu(x, bundles, number, act, gated, y, up_bias, tokens, weights, memory)


def _norm_arguments(x: Floats, weight: Floats, bias: Floats | None, out: Floats) -> None:
    _array("x", x, np.float32, 2)
    _vector("weight", weight, x.shape[1])
    _vector("bias", bias, x.shape[1])
    _array("out", out, np.float32, 2)
    _shape("out", out, *x.shape)
    _writable("out", out)


def rms_norm(x: Floats, weight: Floats, eps: float, out: Floats) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight over rows of x [N, K]; row strides allowed, out may be x."""
    _norm_arguments(x, weight, None, out)
    if x.size:
        _cpu.rms_norm(x, weight, eps, out)


def layer_norm(x: Floats, weight: Floats, bias: Floats | None, eps: float, out: Floats) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over rows of x [N, K]; out may be x."""
    _norm_arguments(x, weight, bias, out)
    if x.size:
        _cpu.layer_norm(x, weight, bias, eps, out)


def rope(x: Floats, cos: Floats, sin: Floats) -> None:
    """Rotates the halves of each head of x [B, heads, D] in place; cos and sin [B, D / 2].

    Strides are free in the first two dimensions.
    """
    _array("x", x, np.float32, 3)
    _writable("x", x)
    if x.shape[2] % 2:
        raise ValueError(f"x: expected an even head dimension, found {x.shape[2]}")
    for name, array in (("cos", cos), ("sin", sin)):
        _array(name, array, np.float32, 2)
        _shape(name, array, x.shape[0], x.shape[2] // 2)
        _contiguous(name, array, 2)
    if x.size:
        _cpu.rope(x, cos, sin)


def _cache(kv: Any, kv_heads: int | None, dim: int) -> None:
    if not isinstance(kv, np.ndarray) or kv.dtype not in (np.uint16, np.float32):
        found = getattr(kv, "dtype", type(kv).__name__)
        raise ValueError(f"kv: expected uint16 (bfloat16 bits) or float32, found {found}")
    _array("kv", kv, kv.dtype.type, 4)
    _shape("kv", kv, kv_heads, None, 2, dim)
    _contiguous("kv", kv, 4)


def kv_append(k: Floats, v: Floats, kv: NDArray[Any], start: int) -> None:
    """Writes k and v [B, KVH, D] at positions start.. of kv [KVH, context, 2, D], uint16 (bfloat16 bits) or float32.

    k and v may have a stride in the first dimension.
    """
    _array("k", k, np.float32, 3)
    _contiguous("k", k, 2)
    _array("v", v, np.float32, 3)
    _shape("v", v, *k.shape)
    _contiguous("v", v, 2)
    _cache(kv, k.shape[1], k.shape[2])
    _writable("kv", kv)
    if start < 0 or start + k.shape[0] > kv.shape[1]:
        raise ValueError(f"start: positions {start} to {start + k.shape[0]} are outside a context of {kv.shape[1]}")
    if k.size:
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
) -> None:
    """Causal attention of tokens at positions start.. over kv, which already holds their keys and values.

    q [B, H, D], stride allowed in the first dimension; kv [KVH, context, 2, D]; out [B, H * D]. Token b at position
    p = start + b attends to max(0, p - window + 1)..p. scratch uint8 [attention_scratch_bytes(...)]; None allocates.
    """
    _array("q", q, np.float32, 3)
    _contiguous("q", q, 2)
    tokens, heads, dim = q.shape
    if not 0 < dim <= WIDEST_HEAD:
        raise ValueError(f"q: heads of 1 to {WIDEST_HEAD} numbers are supported, found {dim}")
    _cache(kv, None, dim)
    if not kv.shape[0] or heads % kv.shape[0]:
        raise ValueError(f"kv: {heads} query heads cannot share {kv.shape[0]} KV heads")
    if start < 0 or start + tokens > kv.shape[1]:
        raise ValueError(f"start: positions {start} to {start + tokens} are outside a context of {kv.shape[1]}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected a positive number of tokens or None, found {window}")
    _array("out", out, np.float32, 2)
    _shape("out", out, tokens, heads * dim)
    _writable("out", out)
    if tokens and heads:
        memory = _scratch(scratch, attention_scratch_bytes(tokens, heads, kv.shape[0], dim))
        _cpu.attention(q, kv, start, window or 0, scale, softcap or 0.0, out, memory)


def attention_scratch_bytes(tokens: int, heads: int, kv_heads: int, dim: int) -> int:
    """Scratch of `attention`, whatever the context, with the present number of threads."""
    return int(_cpu.attention_scratch_bytes(tokens, heads, kv_heads, dim))


def quantize(weights: Floats, codec: Codec, out: Bytes, importance: Floats | None = None) -> None:
    """Encodes weights [n, k] as rows, out uint8 [n, row_bytes] (row stride allowed).

    importance [k] says what each column's squared error counts (int4; None: all the same).
    """
    _array("weights", weights, np.float32, 2)
    _contiguous("weights", weights, 2)
    _array("out", out, np.uint8, 2)
    _writable("out", out)
    if codec not in _CODECS:
        raise ValueError(f"codec: expected a Codec, found {codec!r}")
    n, k = weights.shape
    if not 0 < k <= LONGEST_ROW:
        raise ValueError(f"weights: rows of 1 to {LONGEST_ROW} numbers are supported, found {k}")
    _shape("out", out, n, row_bytes(codec, k))
    _vector("importance", importance, k)
    if n:
        _cpu.quantize(weights, _CODECS[codec], importance, out)


def dequantize(rows: Bytes, codec: Codec, k: int, out: Floats) -> None:
    """out [n, k] = the weights of rows uint8 [n, >= row_bytes] (row strides allowed)."""
    _bundles(rows, codec, 1, k)
    _array("out", out, np.float32, 2)
    _shape("out", out, rows.shape[0], k)
    _writable("out", out)
    if rows.shape[0]:
        _cpu.dequantize(rows, _CODECS[codec], out)


def read_bandwidth(data: Bytes) -> int:
    """Reads every byte of data uint8 [n] with all threads, and does nothing else: the ceiling to time against."""
    _array("data", data, np.uint8, 1)
    return int(_cpu.read_all(data))
