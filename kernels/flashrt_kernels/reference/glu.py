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
from flashrt_kernels.rows import Codec, NeuronCodecs, row_bytes


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x), by a name of `flashrt_kernels.activations`."""
    function, threshold, _ = parse(activation)
    if function == "silu":
        return functional.silu(x)
    if function == "relu":
        return x.masked_fill(x <= threshold, 0.0)
    if function == "relu2":
        return functional.relu(x).square()
    return functional.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")


def product_with(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    found = parse(activation)
    if found.gate_only:
        return activate(gate, activation) * up
    gate, up = gate.clamp(max=found.limit), up.clamp(-found.limit, found.limit)
    return gate * torch.sigmoid(found.threshold * gate) * (up + 1)


def _matrices(bundles: Tensor, codecs: NeuronCodecs, k: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gate, up and down of all neurons, float32 [neurons, k] each; gate is None where there is none."""
    at = 0

    def rows(codec: Codec, count: int, width: int) -> Tensor:
        nonlocal at
        size = row_bytes(codec, width)
        part = bundles[:, at : at + count * size].reshape(-1, size)
        at += count * size
        return decode(part, codec, width)

    group = codecs.group
    gate = None if codecs.gate is None else rows(codecs.gate, group, k)
    up = rows(codecs.up, group, k)
    if group == 1:
        return gate, up, rows(codecs.down, 1, k)
    return gate, up, rows(codecs.down, k, group).view(-1, k, group).transpose(1, 2).reshape(-1, k)


def _biased(products: Tensor, bias: Tensor | None) -> Tensor:
    return products if bias is None else products + bias


def _glu(
    x: Tensor,
    weights: FfnWeights[Tensor],
    y: Tensor,
    routed: RoutedTokens[Tensor] | None,
    wide: bool,
    usage: Tensor | None,
) -> None:
    k, codecs = x.shape[1], weights.codecs
    tokens = None if routed is None else routed.tokens.long()
    part = x if tokens is None else x[tokens]
    gate, up, down = _matrices(weights.bundles, codecs, k)
    h = _biased(product(part, up.T, codecs.up, wide), weights.up_bias)
    if gate is not None:
        h = product_with(_biased(product(part, gate.T, codecs.up, wide), weights.gate_bias), h, weights.activation)
    else:
        h = activate(h, weights.activation)
    if routed is not None:
        h = h * routed.factors[:, None]
    if usage is not None:
        usage += h.abs().sum(0).view(-1, codecs.group).sum(1)
    result = product(h, down, codecs.up, wide)
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
