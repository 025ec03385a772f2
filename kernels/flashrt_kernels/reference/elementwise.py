"""Norms, activations and rotations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from flashrt_kernels.reference.glu import activate as activation_of
from flashrt_kernels.reference.glu import product_with


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x²) + eps) * weight."""
    out.copy_(x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias."""
    out.copy_(functional.layer_norm(x, x.shape[1:], weight, bias, eps))


def softcap(x: Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap) in place."""
    x.div_(cap).tanh_().mul_(cap)


def activate(gate: Tensor, up: Tensor | None, activation: str) -> None:
    """gate = act(gate) * up in place; without up, act(gate)."""
    gate.copy_(activation_of(gate, activation) if up is None else product_with(gate, up, activation))


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates the halves of each head of x [B, heads, D] in place; cos and sin [B, D / 2]."""
    a, b = x.chunk(2, dim=2)
    c, s = cos[:, None], sin[:, None]
    x.copy_(torch.cat((a * c - b * s, b * c + a * s), dim=2))
