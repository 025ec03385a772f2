"""Granite 3, dense: Llama with multipliers of embeddings, attention scores, what blocks give, and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER
from flashrt.errors import UnsupportedModelError
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER
GGUF_KEYS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")


def spec(config: Config) -> ModelSpec:
    bias, scale = config.flag("attention_bias"), config.positive("attention_multiplier", 1.0)
    heads = attention(config, config.head_dim(), config.rope(), scale=scale, qkv_bias=bias, out_bias=bias)
    options = {
        "embed_scale": config.positive("embedding_multiplier", 1.0),
        "residual_scale": config.positive("residual_multiplier", 1.0),
        "logit_scale": 1 / config.positive("logits_scaling", 1.0),
    }
    return decoder_spec(config, [Layer(heads, gated_ffn(config))] * layer_count(config), context=2048, **options)


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
