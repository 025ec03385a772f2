"""Qwen3-Next, and Qwen 3.5 mixtures: hybrids of which layers are mixtures with a gated shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch import qwen2_moe, qwen3_5
from flashrt.arch.config import Config
from flashrt.arch.decoder import gated_ffn, layer_count
from flashrt.arch.hybrid import GGUF_HYBRID, GGUF_RECURRENT, HYBRID, RECURRENT, gguf_hybrid, hybrid_spec, with_ahead
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import GGUF_KEYS as MIXTURE_KEYS
from flashrt.arch.mixture import experts
from flashrt.arch.names import Names, Share
from flashrt.arch.qwen3_moe import sparse_layers
from flashrt.spec import DeltaNet, Ffn, ModelSpec


def _mixture(names: Names) -> Names:
    moe = qwen2_moe.NAMES
    layer = {**names.layer, "shared_gate": moe.layer["shared_gate"]}
    return replace(names, layer=layer, experts=moe.experts, shared_expert=moe.shared_expert)


def _grouped(net: DeltaNet, *counts: int) -> list[Share]:
    """Rows that lie together for each key head, so many of each kind."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    groups = net.key_heads, ends[-1]
    return [Share(groups, (end - count, end)) for count, end in zip(counts, ends, strict=True)]


def _projections(net: DeltaNet) -> list[Share]:
    """Queries, keys, values and gates."""
    values = net.width // net.key_heads
    return _grouped(net, net.key_dim, net.key_dim, values, values)


def _gates(net: DeltaNet) -> list[Share]:
    """What is written, and what decays."""
    return _grouped(net, net.heads // net.key_heads, net.heads // net.key_heads)


_GATE_SHARES = {"beta": lambda net: _gates(net)[:1], "decay": lambda net: _gates(net)[1:]}
MOE_NAMES = with_ahead(_mixture(qwen3_5.NAMES))
MOE_GGUF = qwen3_5.GGUF
NAMES = with_ahead(
    replace(
        _mixture(HYBRID),
        recurrent={
            **RECURRENT,
            "qkv": ("linear_attn.in_proj_qkvz.weight",) * 3,
            "gate": ("linear_attn.in_proj_qkvz.weight",),
            "beta": ("linear_attn.in_proj_ba.weight",),
            "decay": ("linear_attn.in_proj_ba.weight",),
        },
        shares={"qkv": lambda net: _projections(net)[:3], "gate": lambda net: _projections(net)[3:], **_GATE_SHARES},
    )
)
GGUF = replace(
    GGUF_HYBRID,
    recurrent={**GGUF_RECURRENT, "beta": ("ssm_ba.weight",), "decay": ("ssm_ba.weight",)},
    shares=_GATE_SHARES,
)
GGUF_KEYS = (*qwen3_5.GGUF_KEYS, *MIXTURE_KEYS)


def spec(config: Config) -> ModelSpec:
    sparse, mixture = sparse_layers(config), _experts(config, 512, config.flag("norm_topk_prob", True))
    return hybrid_spec(config, [mixture if own else gated_ffn(config) for own in sparse])


def moe_spec(config: Config) -> ModelSpec:
    return hybrid_spec(config, [_experts(config, 256, True)] * layer_count(config))


def _experts(config: Config, default: int, normalize: bool) -> Ffn:
    shared = config.integer("shared_expert_intermediate_size", 512)
    count = config.integer("num_experts", config.data.get("num_local_experts", default))
    return experts(config, count, shared=shared, shared_gate=True, normalize_router=normalize)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return _experts_gguf(config, fields) | gguf_hybrid(config, fields)


def moe_gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return _experts_gguf(config, fields) | qwen3_5.gguf(config, fields)


def _experts_gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return qwen2_moe.gguf(config, fields) | {"norm_topk_prob": True}  # llama.cpp always rescales these architectures
