"""Feed-forward blocks whose neurons lie in bundles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from flashrt_kernels.activations import parse
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.reference.linear import product
from flashrt_kernels.reference.quantize import decode
from flashrt_kernels.rows import Codec, row_bytes


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x), by a name of `flashrt_kernels.activations`."""
    function, threshold = parse(activation)
    if function == "silu":
        return functional.silu(x)
    if function == "relu":
        return x.masked_fill(x <= threshold, 0.0)
    if function == "relu2":
        return functional.relu(x).square()
    return functional.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")


def _bundle_rows(bundles: Tensor, codec: Codec, k: int, index: int) -> Tensor:
    size = row_bytes(codec, k)
    return decode(bundles[:, index * size : (index + 1) * size], codec, k)


def _glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None,
    wide: bool,
    usage: Tensor | None,
) -> None:
    k, bundles, codec = x.shape[1], weights.bundles, weights.codec
    tokens = None if routed is None else routed.tokens.long()
    part = x if tokens is None else x[tokens]
    first = product(part, _bundle_rows(bundles, codec, k, 0).T, codec, wide)
    if weights.gated:
        up = product(part, _bundle_rows(bundles, codec, k, 1).T, codec, wide)
        h = activate(first, weights.activation) * up
    else:
        h = activate(first if weights.up_bias is None else first + weights.up_bias, weights.activation)
    if routed is not None:
        h = h * routed.factors[:, None]
    if usage is not None:
        usage += h.abs().sum(0)
    result = product(h, _bundle_rows(bundles, codec, k, 2 if weights.gated else 1), codec, wide)
    if tokens is None:
        y += result
    else:
        y.index_add_(0, tokens, result)


def glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None = None,
    slots: Tensor | None = None,
    streamed_bundles: Sequence[Tensor] | None = None,
    usage: Tensor | None = None,
) -> None:
    """y[b] += h * down, summed over neurons."""
    if slots is not None:
        own, places = weights.bundles, slots.long()
        every = own if streamed_bundles is None else torch.cat([own, *streamed_bundles])
        taken = every[torch.where(places < 0, len(own) - 1 - places, places)]
        weights = replace(weights, bundles=taken)
    _glu(x, weights, y, routed, False, usage)


def gemm_glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None = None,
    scratch: Tensor | None = None,
    usage: Tensor | None = None,
) -> None:
    """`glu` for many tokens."""
    _glu(x, weights, y, routed, True, usage)
