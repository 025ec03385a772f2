"""ERNIE 4.5 mixtures: interleaved rotary embedding, softmax scores whose choice is corrected, shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.harmless import HF_HARMLESS
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import GGUF_KEYS as SHARED_KEYS
from flashrt.arch.mixture import MIXTURE, experts
from flashrt.arch.mixture import gguf as experts_gguf
from flashrt.arch.names import GGUF_PERMUTED
from flashrt.errors import UnsupportedModelError
from flashrt.spec import Layer, ModelSpec

NAMES = replace(
    MIXTURE,
    layer={**MIXTURE.layer, "router.correction": ("mlp.moe_statics.e_score_correction_bias",)},
    permuted=True,
    # Layers that predict further tokens, beside the model itself.
    harmless=(*HF_HARMLESS, r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\..*"),
)
GGUF = GGUF_PERMUTED
GGUF_KEYS = (*SHARED_KEYS, "interleave_moe_layer_step")


def spec(config: Config) -> ModelSpec:
    config.refuse("use_bias", False)
    heads = attention(config, config.head_dim(), config.rope(5e5))
    config = Config({"num_experts_per_tok": config.data.get("moe_k", 6), **config.data}, config.family)
    count, step = config.integer("moe_num_experts", 64), config.integer("moe_layer_interval", 1)
    first, last = config.integer("moe_layer_start_index", 1, minimum=0), config.integer("moe_layer_end_index", -1, -1)
    shared = config.integer("moe_num_shared_experts", 2, minimum=0) * config.integer("moe_intermediate_size")
    mixture = experts(config, count, shared=shared, normalize_router=True, router_correction=True)
    if config.number("moe_norm_min", 1e-12) > mixture.experts_per_token / count:  # of scores, whose sum is more
        raise UnsupportedModelError(f"ernie4_5_moe with moe_norm_min={config.data['moe_norm_min']} is not supported")
    sparse = [(i + 1) % step == 0 and first <= i and (last < 0 or i <= last) for i in range(layer_count(config))]
    layers = [Layer(heads, mixture if own else gated_ffn(config)) for own in sparse]
    return decoder_spec(config, layers, context=131072, tied=True, norm_eps=config.number("rms_norm_eps", 1e-5))


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return experts_gguf(config, fields) | {
        "moe_num_experts": fields.integer("expert_count"),
        "moe_k": fields.integer("expert_used_count"),
        "moe_num_shared_experts": fields.integer("expert_shared_count", 0),
        "moe_layer_interval": fields.integer("interleave_moe_layer_step", 1),
        "moe_layer_start_index": fields.integer("leading_dense_block_count", 0),
    }
