"""The operations every backend has, and the choice of a backend.

Array types are the backend's: numpy arrays for `cpu`, torch tensors for `torch`. Shapes, dtypes and strides are
documented where they are checked, in `flashrt_kernels.cpu`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import Codec

BACKENDS = {"cpu": "flashrt_kernels.cpu", "torch": "flashrt_kernels.reference"}


class BackendUnavailable(RuntimeError):
    """A backend cannot be used here; the message says why and what to do."""


class Ops(Protocol):
    """A backend. Results are written into arrays of the caller's.

    B tokens, K numbers a row, D numbers a head, n bundles of `flashrt_kernels.rows`. Floats are float32.
    """

    def linear(self, x: Any, bundles: Any, codec: Codec, out: Any, row0: int, rows: int, bias: Any = None) -> None:
        """out[b, row0 + r] = x[b] · W[r] + bias[r], few tokens; x [B, K], bundles [n, bytes], out [B, any]."""

    def gemm_linear(
        self,
        x: Any,
        bundles: Any,
        codec: Codec,
        out: Any,
        row0: int,
        rows: int,
        bias: Any = None,
        scratch: Any = None,
    ) -> None:
        """`linear` for many tokens; scratch uint8 [gemm_scratch_bytes(B, K)]."""

    def gemm_scratch_bytes(self, tokens: int, k: int, neurons: int = 0) -> int:
        """Scratch of `gemm_linear` on `tokens` rows of k numbers, or with `neurons` that of `gemm_glu`."""

    def glu(
        self,
        x: Any,
        weights: FfnWeights[Any],
        y: Any,
        routed: RoutedTokens[Any] | None = None,
        slots: Any = None,
        streamed_bundles: Sequence[Any] | None = None,
        usage: Any = None,
    ) -> None:
        """y[b] += act(gate·x) (up·x) down, few tokens; x, y [B, K].

        slots int32 [s] names the bundles that take part (None: all): i >= 0 is bundle i of the weights, -1 - i bundle
        i of the arrays `streamed_bundles`, numbered one after the other. usage [s] += their |h|.
        """

    def gemm_glu(
        self,
        x: Any,
        weights: FfnWeights[Any],
        y: Any,
        routed: RoutedTokens[Any] | None = None,
        scratch: Any = None,
        usage: Any = None,
    ) -> None:
        """`glu` for many tokens; scratch uint8 [gemm_scratch_bytes(tokens, K, n)]."""

    def rms_norm(self, x: Any, weight: Any, eps: float, out: Any) -> None:
        """out = x / sqrt(mean(x²) + eps) * weight over rows; x, out [B, K], weight [K]."""

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float, out: Any) -> None:
        """out = (x - mean) / sqrt(variance + eps) * weight + bias over rows; x, out [B, K], weight, bias [K]."""

    def rope(self, x: Any, cos: Any, sin: Any) -> None:
        """Rotates the halves of each head in place; x [B, heads, D], cos, sin [B, D / 2]."""

    def kv_append(self, k: Any, v: Any, kv: Any, start: int) -> None:
        """Writes k, v [B, KVH, D] at positions start.. of kv [KVH, context, 2, D]."""

    def attention(
        self,
        q: Any,
        kv: Any,
        start: int,
        window: int | None,
        scale: float,
        softcap: float | None,
        out: Any,
        scratch: Any = None,
        parents: Any = None,
    ) -> None:
        """Causal attention of q [B, H, D] at positions start.. over kv [KVH, context, 2, D]; out [B, H * D].

        parents int32 [B] makes the tokens a tree: each follows the one that is named, or with -1 the sequence."""

    def attention_scratch_bytes(self, tokens: int, heads: int, kv_heads: int, dim: int) -> int:
        """Scratch of `attention` for q [tokens, heads, dim], whatever the context."""

    def quantize(self, weights: Any, codec: Codec, out: Any, importance: Any = None) -> None:
        """Encodes weights [n, k] into out uint8 [n, row_bytes]; importance [k] weighs the columns' errors."""

    def dequantize(self, rows: Any, codec: Codec, k: int, out: Any) -> None:
        """Decodes rows uint8 [n, ≥ row_bytes] into out [n, k]."""

    def reserve(self, k: int) -> int:
        """Allocates what `linear` and `glu` keep for rows of up to k; the bytes."""

    def set_threads(self, n: int) -> None:
        """Threads that share each operation from now on, the caller's included."""

    def threads(self) -> int:
        """Threads that share each operation."""

    def isa(self) -> str:
        """The instruction set, or the device, in use."""


def load(name: str) -> Ops:
    """The backend `name`: 'cpu' (numpy, C++) or 'torch' (any device). Raises BackendUnavailable with the reason."""
    if name not in BACKENDS:
        raise BackendUnavailable(f"no backend {name!r}: expected one of {', '.join(BACKENDS)}")
    try:
        return cast(Ops, importlib.import_module(BACKENDS[name]))
    except ImportError as error:
        if name == "cpu":
            remedy = "the compiled extension is missing: build it with `pip install .` (needs a C++17 compiler)"
        else:
            remedy = "torch is missing: install it with `pip install 'flashrt[torch]'`"
        raise BackendUnavailable(f"backend {name!r} is unavailable ({error}); {remedy}") from error
