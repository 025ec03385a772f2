"""The operations every backend has, and the choice of a backend.

Array types are the backend's: numpy arrays for `cpu`, torch tensors for `torch`. Shapes, dtypes and strides are
documented where they are checked, in `flashrt_kernels.cpu`.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol, cast

from flashrt_kernels.rows import Codec

BACKENDS = {"cpu": "flashrt_kernels.cpu", "torch": "flashrt_kernels.reference"}


class BackendUnavailable(RuntimeError):
    """A backend cannot be used here; the message says why and what to do."""


class Ops(Protocol):
    """A backend. Results are written into arrays of the caller's."""

    def linear(self, x: Any, bundles: Any, codec: Codec, out: Any, row0: int, rows: int, bias: Any = None) -> None: ...

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
    ) -> None: ...

    def gemm_scratch_bytes(self, tokens: int, k: int, neurons: int = 0) -> int: ...

    def glu(
        self,
        x: Any,
        bundles: Any,
        codec: Codec,
        activation: Any,
        gated: bool,
        y: Any,
        up_bias: Any = None,
        tokens: Any = None,
        weights: Any = None,
    ) -> None: ...

    def gemm_glu(
        self,
        x: Any,
        bundles: Any,
        codec: Codec,
        activation: Any,
        gated: bool,
        y: Any,
        up_bias: Any = None,
        tokens: Any = None,
        weights: Any = None,
        scratch: Any = None,
    ) -> None: ...

    def rms_norm(self, x: Any, weight: Any, eps: float, out: Any) -> None: ...

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float, out: Any) -> None: ...

    def rope(self, x: Any, cos: Any, sin: Any) -> None: ...

    def kv_append(self, k: Any, v: Any, kv: Any, start: int) -> None: ...

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
    ) -> None: ...

    def attention_scratch_bytes(self, tokens: int, heads: int, kv_heads: int, dim: int) -> int: ...

    def quantize(self, weights: Any, codec: Codec, out: Any, importance: Any = None) -> None: ...

    def dequantize(self, rows: Any, codec: Codec, k: int, out: Any) -> None: ...

    def reserve(self, k: int, neurons: int = 0) -> int: ...

    def set_threads(self, n: int) -> None: ...

    def threads(self) -> int: ...

    def isa(self) -> str: ...


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
