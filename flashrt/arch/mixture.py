"""What mixtures of experts share: names of their tensors, and how their fields are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER, HF_LAYER, FfnNames, gated_names
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import MOST_EXPERTS, Ffn

EXPERT_NAMES = (
    gated_names("mlp.experts.{e}."),
    FfnNames("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", stacked=True, fused=True),
)
MIXTURE = replace(
    HF_DECODER,
    layer={**HF_LAYER, "router.correction": ("mlp.gate.e_score_correction_bias",)},
    experts=EXPERT_NAMES,
    shared_expert=(gated_names("mlp.shared_experts."),),
)
"""The naming of DeepSeek's mixtures, which others follow."""

GGUF_KEYS = ("expert_shared_count", "expert_shared_feed_forward_length", "leading_dense_block_count")
GGUF_ROUTER_KEYS = (*GGUF_KEYS, "expert_group_count", "expert_gating_func", "expert_weights_scale")
_SIGMOID = 2  # expert_gating_func of llama.cpp


def experts(config: Config, count: int, width: str = "moe_intermediate_size", **options: Any) -> Ffn:
    """A mixture of `count` experts, whose width is field `width`; `options` override or add fields."""
    if count > MOST_EXPERTS:
        raise CheckpointError(f"{config.family} config: {count} experts, expected at most {MOST_EXPERTS}")
    fields: dict[str, Any] = {
        "experts": count,
        "experts_per_token": config.integer("num_experts_per_tok", maximum=count),
        "normalize_router": config.flag("norm_topk_prob"),
        "activation": config.activation("hidden_act", "silu"),
        **options,
    }
    return Ffn(config.integer(width), **fields)


def sigmoid_experts(config: Config) -> Ffn:
    """A mixture with DeepSeek-V3's router (arXiv:2412.19437, section 2.1.2)."""
    config.refuse("scoring_func", "sigmoid", "noaux_tc")
    config.refuse("topk_method", "noaux_tc")
    shared = config.integer("n_shared_experts", 0, minimum=0)
    groups = config.integer("n_group", 1)
    return experts(
        config,
        config.integer("n_routed_experts"),
        router_scores="sigmoid",
        router_correction=True,
        router_groups=groups,
        router_groups_used=config.integer("topk_group", 1, maximum=groups),
        router_scale=config.positive("routed_scaling_factor", 1.0),
        shared=shared * config.integer("moe_intermediate_size"),
    )


def dense_first(config: Config, mixture: Ffn, default: int) -> list[Ffn]:
    """The block of every layer: dense ones first, as many as `first_k_dense_replace` says."""
    count, dense = layer_count(config), config.integer("first_k_dense_replace", default, minimum=0)
    return [gated_ffn(config) if i < dense else mixture for i in range(count)]


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """Fields of a mixture whose router takes the softmax of all logits and does not rescale it."""
    return {
        "num_experts": fields.integer("expert_count"),
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "norm_topk_prob": False,
    }


def sigmoid_gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """Fields of a mixture with DeepSeek-V3's router."""
    scores = fields.integer("expert_gating_func", _SIGMOID)
    if scores != _SIGMOID:
        raise UnsupportedModelError(f"GGUF with expert_gating_func={scores} is not supported, expected {_SIGMOID}")
    return gguf(config, fields) | {
        "n_routed_experts": fields.integer("expert_count"),
        "n_shared_experts": fields.integer("expert_shared_count", 0),
        "n_group": fields.integer("expert_group_count"),
        "topk_group": fields.integer("expert_group_used_count"),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        "first_k_dense_replace": fields.integer("leading_dense_block_count", 0),
        "attention_bias": False,  # what there is says the file itself
        "sliding_window": None,
    }
