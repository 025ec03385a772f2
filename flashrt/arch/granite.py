"""Granite 3: Llama with multipliers of embeddings, attention scores, what blocks give, and logits; and its mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import GGUF_KEYS as SHARED_KEYS
from flashrt.arch.mixture import experts
from flashrt.arch.mixture import gguf as experts_gguf
from flashrt.arch.names import HF_DECODER, HF_LAYER, FfnNames
from flashrt.errors import UnsupportedModelError
from flashrt.spec import Ffn, Layer, ModelSpec

_MOE, _SHARED = "block_sparse_moe.", "shared_mlp."
_INPUT, _OUTPUT = "input_linear.weight", "output_linear.weight"
NAMES = HF_DECODER
MOE_NAMES = replace(
    HF_DECODER,
    layer={**HF_LAYER, "router": (_MOE + "router.layer.weight",)},
    experts=(FfnNames(_MOE + _INPUT, _MOE + _INPUT, _MOE + _OUTPUT, stacked=True, fused=True),),
    shared_expert=(FfnNames(_SHARED + _INPUT, _SHARED + _INPUT, _SHARED + _OUTPUT, fused=True),),
)
GGUF_KEYS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
MOE_GGUF_KEYS = (*GGUF_KEYS, *SHARED_KEYS)


def spec(config: Config) -> ModelSpec:
    return _spec(config, gated_ffn(config, config.flag("mlp_bias")))


def moe_spec(config: Config) -> ModelSpec:
    shared = config.integer("shared_intermediate_size", 0, minimum=0) if config.family == "granitemoeshared" else 0
    count = config.integer("num_local_experts", 8)
    return _spec(config, experts(config, count, "intermediate_size", normalize_router=True, shared=shared))


def _spec(config: Config, ffn: Ffn) -> ModelSpec:
    bias, scale = config.flag("attention_bias"), config.positive("attention_multiplier", 1.0)
    heads = attention(config, config.head_dim(), config.rope(), scale=scale, qkv_bias=bias, out_bias=bias)
    options = {
        "embed_scale": config.positive("embedding_multiplier", 1.0),
        "residual_scale": config.positive("residual_multiplier", 1.0),
        "logit_scale": 1 / config.positive("logits_scaling", 1.0),
    }
    return decoder_spec(config, [Layer(heads, ffn)] * layer_count(config), context=2048, **options)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    if not fields.flag("rope.scaling.finetuned", True):
        raise UnsupportedModelError("GGUF granite with rope.scaling.finetuned=False is not supported")
    # Without a scale, llama.cpp takes the usual one; zeros stand for fields that a converter left out.
    usual = config["head_dim"] ** -0.5
    return {
        "attention_multiplier": fields.number("attention.scale", usual) or usual,
        "embedding_multiplier": fields.number("embedding_scale", 1.0) or 1.0,
        "residual_multiplier": fields.number("residual_scale", 1.0) or 1.0,
        "logits_scaling": fields.number("logit_scale", 1.0),
    }


def moe_gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    shared = fields.integer("expert_shared_feed_forward_length", 0)
    mixture = {"num_local_experts": fields.integer("expert_count"), "shared_intermediate_size": shared}
    name = {"model_type": "granitemoeshared"} if shared else {}
    return gguf(config, fields) | experts_gguf(config, fields) | mixture | name
