"""Phi-3 and Phi-4 (mini): Llama with fused projections, heads that may be rotated in part, and longrope."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import GGUF_FUSED, GGUF_NAMES, HF_DECODER, HF_FUSED, HF_LAYER
from flashrt.spec import Layer, ModelSpec

NAMES = replace(HF_DECODER, layer={**HF_LAYER, "qkv": ("self_attn.qkv_proj.weight",)}, dense=(HF_FUSED,))
_GGUF_QKV = {"qkv": ("attn_qkv.weight",), "qkv.bias": ("attn_qkv.bias",)}
GGUF = replace(GGUF_NAMES, layer={**GGUF_NAMES.layer, **_GGUF_QKV}, dense=(GGUF_FUSED,))


def spec(config: Config) -> ModelSpec:
    config = Config({"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **config.data}, "phi3")
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.object(key)
        for name in ("rope_type", "type"):  # what longrope was called before
            if parameters.get(name) in ("su", "yarn"):
                config = Config({**config.data, key: {**parameters, name: "longrope"}}, "phi3")
    window = config.optional("sliding_window")
    dim = config.head_dim()
    layer = Layer(attention(config, dim, config.partial_rope(dim), window=window), gated_ffn(config))
    return decoder_spec(config, [layer] * layer_count(config), norm_eps=config.number("rms_norm_eps", 1e-5))


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return {
        "sliding_window": fields.integer("attention.sliding_window") or None,
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }
