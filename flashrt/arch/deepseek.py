"""DeepSeek V2, V3 and R1, and Kimi K2: latent attention, dense layers first, then mixtures with shared experts.

DeepSeek-V2 (arXiv:2405.04434) and DeepSeek-V3 (arXiv:2412.19437).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import decoder_spec
from flashrt.arch.latent import GGUF_LATENT, HF_LATENT, gguf_latent, latent_attention
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import GGUF_ROUTER_KEYS, MIXTURE, dense_first, experts, sigmoid_experts
from flashrt.arch.names import GGUF_AHEAD, GGUF_PERMUTED, HF_AHEAD
from flashrt.errors import UnsupportedModelError
from flashrt.spec import Layer, ModelSpec

NAMES = replace(MIXTURE, latent=HF_LATENT, permuted=True, ahead=HF_AHEAD)
GGUF = replace(GGUF_PERMUTED, latent=GGUF_LATENT, ahead=GGUF_AHEAD)
GGUF_KEYS = (*GGUF_ROUTER_KEYS, "nextn_predict_layers", "rope.scaling.yarn_log_multiplier")

# What transformers' configurations take where a field is absent.
_SIZES = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2 = {**_SIZES, "n_shared_experts": 2, "first_k_dense_replace": 0}
_V3 = {
    **_SIZES,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
_GATING = {0: "deepseek_v2", 1: "deepseek_v2", 2: "deepseek_v3"}  # expert_gating_func: none said, softmax, sigmoid


def v3_spec(config: Config) -> ModelSpec:
    config = Config({**_V3, **config.data}, config.family)
    config.refuse("moe_layer_freq", 1)
    heads = latent_attention(config)
    layers = [Layer(heads, ffn) for ffn in dense_first(config, sigmoid_experts(config), 3)]
    return decoder_spec(config, layers, context=4096)


def v2_spec(config: Config) -> ModelSpec:
    """Of groups of experts, those take part whose best is best: `group_limited_greedy`."""
    config = Config({**_V2, **config.data}, config.family)
    config.refuse("moe_layer_freq", 1)
    config.refuse("scoring_func", "softmax")
    config.refuse("norm_topk_prob", False)  # transformers never rescales, DeepSeek's own code would
    config.refuse("topk_method", "greedy", "group_limited_greedy")
    grouped = config.data.get("topk_method") == "group_limited_greedy"
    mixture = experts(
        config,
        config.integer("n_routed_experts", 64),
        router_groups=config.integer("n_group") if grouped else 1,
        router_groups_used=config.integer("topk_group") if grouped else 1,
        router_group_best=1 if grouped else 2,
        router_scale=config.positive("routed_scaling_factor", 1.0),
        shared=config.integer("n_shared_experts", minimum=0) * config.integer("moe_intermediate_size"),
    )
    heads = latent_attention(config)
    layers = [Layer(heads, ffn) for ffn in dense_first(config, mixture, 0)]
    return decoder_spec(config, layers, context=2048)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """Of llama.cpp's architecture for all of these; the router tells V2 from what came later."""
    gating = fields.integer("expert_gating_func", 0)
    if gating not in _GATING:
        raise UnsupportedModelError(f"GGUF deepseek2 with expert_gating_func={gating} is not supported")
    groups = fields.integer("expert_group_count", 1) or 1
    return gguf_latent(config, fields) | {
        "model_type": _GATING[gating],
        "num_hidden_layers": (config["num_hidden_layers"] or 0) - fields.integer("nextn_predict_layers", 0),
        "first_k_dense_replace": fields.integer("leading_dense_block_count", 0),
        "n_routed_experts": fields.integer("expert_count"),
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "n_shared_experts": fields.integer("expert_shared_count", 0),
        "n_group": groups,
        "topk_group": fields.integer("expert_group_used_count", 1) or 1,
        "topk_method": None if gating == 2 else "greedy" if groups == 1 else "group_limited_greedy",
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
    }
