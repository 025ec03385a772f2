"""Feed-forward blocks whose gate and up projections lie by input channel (`flashrt_kernels.channels`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashrt_kernels.channels import CHANNELS, group_bytes
from flashrt_kernels.reference.glu import activate, product_with
from flashrt_kernels.reference.quantize import decode
from flashrt_kernels.rows import Codec


def _two_bits(half: Tensor) -> Tensor:
    """The two-bit values uint8 [..., C] of halves uint8 [..., C / 4]."""
    tiles = half.unflatten(-1, (-1, 4, 4, 4))  # tile, L, p, d
    columns = torch.stack([tiles >> 2 * k & 3 for k in range(4)], -4)  # tile, k, L, p, d
    return columns.transpose(-3, -2).flatten(-5)


def _weights(groups: Tensor, ratio: Tensor, fine: int, read: int) -> Tensor:
    """Weights float32 [groups * 32, C], in units of the columns' scales, with the fine halves of `read` channels."""
    columns, count = len(ratio), len(groups)
    a, b = (groups[:, None, i * columns : (i + 1) * columns].to(torch.float32) for i in range(2))
    halves = groups[:, 2 * columns : group_bytes(columns, fine)].reshape(count, CHANNELS + fine, columns // 4)
    codes = 4.0 * _two_bits(halves[:, :CHANNELS]) + 1.5
    codes[:, :read] += _two_bits(halves[:, CHANNELS : CHANNELS + read]) - 1.5
    return (a * codes - ratio * b).flatten(0, 1)


def gate_up(
    x: Tensor,
    groups: Tensor,
    first: int,
    fine: int,
    order: Tensor,
    norms: Tensor,
    ratio: Tensor,
    sums: Tensor,
    coarse_from: float,
    fine_from: float,
) -> tuple[int, int]:
    """sums[b] += gate and up of x[b], for the channels that count; how many coarse and fine halves took part."""
    places = order[CHANNELS * first :][: CHANNELS * len(groups)].long()
    values, counts = x[:, places.clamp(min=0)], (x.abs() * norms)[:, places.clamp(min=0)]
    has_fine = torch.arange(len(places), device=x.device) % CHANNELS < fine
    coarse = (places >= 0) & ~(counts < coarse_from)  # what is not a number takes part
    whole = coarse & has_fine & ~(counts < fine_from)
    sums += values.where(whole, 0.0) @ _weights(groups, ratio, fine, fine)
    sums += values.where(coarse & ~whole, 0.0) @ _weights(groups, ratio, fine, 0)
    return int(coarse.sum()), int(whole.sum())


def gemm_gate_up(
    x: Tensor,
    groups: Tensor,
    first: int,
    fine: int,
    order: Tensor,
    ratio: Tensor,
    sums: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """`gate_up` for many tokens, of all channels."""
    gate_up(x, groups, first, fine, order, torch.ones_like(x[0]), ratio, sums, -math.inf, -math.inf)


def gate_up_scratch_bytes(tokens: int, groups: int) -> int:
    """Torch allocates for itself."""
    return 0


def down(
    sums: Tensor,
    scale: Tensor,
    norms: Tensor,
    activation: str,
    gated: bool,
    up_bias: Tensor | None,
    rows: Tensor,
    codec: Codec,
    first: int,
    y: Tensor,
    threshold: float,
) -> int:
    """y[b] += h * row, for the neurons that count; how many that were."""
    own = slice(first, first + len(rows))
    h, *up = (part[:, own] for part in (sums * scale).chunk(2 if gated else 1, 1))
    h = h if up_bias is None else h + up_bias[own]
    h = product_with(h, up[0], activation) if up else activate(h, activation)
    taken = ~(h.abs() * norms[own] < threshold)  # what is not a number takes part
    y += h.where(taken, 0.0) @ decode(rows, codec, y.shape[1])
    return int(taken.sum())


def gemm_down(
    sums: Tensor,
    scale: Tensor,
    norms: Tensor,
    activation: str,
    gated: bool,
    up_bias: Tensor | None,
    rows: Tensor,
    codec: Codec,
    first: int,
    y: Tensor,
    scratch: Tensor | None = None,
) -> None:
    """`down` for many tokens, of all neurons."""
    down(sums, scale, norms, activation, gated, up_bias, rows, codec, first, y, -math.inf)
