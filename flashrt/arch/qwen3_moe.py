"""Qwen 3 with a mixture of experts in some or all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER, FfnNames
from flashrt.errors import CheckpointError
from flashrt.spec import Ffn, Layer, ModelSpec

_EXPERT = "mlp.experts.{e}."
EXPERT_NAMES = (
    FfnNames(_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", _EXPERT + "down_proj.weight"),
    FfnNames("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", stacked=True, fused=True),
)
NAMES = replace(HF_DECODER, experts=EXPERT_NAMES)


def spec(config: Config) -> ModelSpec:
    config.refuse("use_sliding_window", False)
    bias = config.flag("attention_bias")
    heads = attention(config, config.head_dim(), config.rope(), qkv_bias=bias, out_bias=bias, qk_norm=True)
    layers = [Layer(heads, _experts(config) if sparse else gated_ffn(config)) for sparse in _sparse_layers(config)]
    return decoder_spec(config, layers, context=32768)


def _sparse_layers(config: Config) -> list[bool]:
    step = config.integer("decoder_sparse_step", 1)
    dense = config.data.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(item, int) for item in dense):
        raise CheckpointError(f"{config.family} config: mlp_only_layers is {dense!r}, expected layer numbers")
    return [i not in dense and (i + 1) % step == 0 for i in range(layer_count(config))]


def _experts(config: Config) -> Ffn:
    # 'num_experts' is written as 'num_local_experts' by some versions of transformers.
    experts = config.integer("num_experts", config.data.get("num_local_experts", 128))
    return Ffn(
        config.integer("moe_intermediate_size"),
        config.activation("hidden_act", "silu"),
        experts=experts,
        experts_per_token=config.integer("num_experts_per_tok", maximum=experts),
        normalize_router=config.flag("norm_topk_prob"),
    )


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return {
        "num_experts": fields.integer("expert_count"),
        "num_experts_per_tok": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,  # not in the file: llama.cpp always normalizes this architecture
    }
