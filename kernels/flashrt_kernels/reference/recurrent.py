"""Gated delta nets (Yang et al. 2024, arXiv 2412.06464), row by row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def delta_rule(
    x: Tensor,
    gates: Tensor,
    taps: Tensor,
    rate: Tensor,
    bias: Tensor,
    tiled: bool,
    state: Tensor,
    tail: Tensor,
    out: Tensor,
    advance: int,
    parents: Tensor | None = None,
    scratch: Tensor | None = None,
) -> None:
    """A gated delta net over rows x [N, C]; the first `advance` move state [H, D, V] and tail [n - 1, C] on."""
    rows, heads, (before, dim, values) = len(x), len(state), (len(taps) - 1, *state.shape[1:])
    key_heads = (x.shape[1] - heads * values) // (2 * dim)
    follows = list(range(-1, rows - 1))
    if parents is not None:
        follows[advance:] = [advance + parent if parent >= 0 else advance - 1 for parent in parents.tolist()]
    inputs = torch.cat((tail, x))  # row i at before + i
    beta = gates[:, :heads].sigmoid()
    decay = (rate * functional.softplus(gates[:, heads:] + bias)).exp()
    owner = torch.arange(heads, device=x.device)
    owner = owner % key_heads if tiled else owner // (heads // key_heads)
    states = {-1: state.clone()}
    for i in range(rows):
        row, path = i, []
        for _ in range(len(taps)):
            path.append(before + row)
            row = follows[row] if row >= 0 else row - 1
        mixed = functional.silu((inputs[path[::-1]] * taps).sum(0))
        query, key, value = mixed.split([key_heads * dim, key_heads * dim, heads * values])
        query, key = (_l2_norm(part.reshape(key_heads, dim))[owner] for part in (query, key))
        held = states[follows[i]] * decay[i, :, None, None]
        change = (value.reshape(heads, values) - torch.einsum("hdv,hd->hv", held, key)) * beta[i, :, None]
        states[i] = held + key[:, :, None] * change[:, None]
        if (place := i - rows + len(out)) >= 0:
            out[place] = torch.einsum("hdv,hd->hv", states[i], query * dim**-0.5).flatten()
        if i < advance:
            del states[i - 1]
    state.copy_(states[advance - 1])
    tail.copy_(inputs[advance : advance + before].clone())


def _l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule_scratch_bytes(channels: int, taps: int, dim: int) -> int:
    """Torch allocates for itself."""
    return 0


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight * silu(gate)."""
    out.copy_(x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight * functional.silu(gate))


def sigmoid_gate(x: Tensor, gate: Tensor) -> None:
    """x *= sigmoid(gate) in place."""
    x.mul_(gate.sigmoid())
