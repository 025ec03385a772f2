"""Seed-OSS: Llama with query, key and value biases, and heads of 128."""

from __future__ import annotations

from dataclasses import replace

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.names import GGUF_NAMES, HF_DECODER
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER
GGUF = replace(GGUF_NAMES, layer={**GGUF_NAMES.layer, "norm.ffn": ("post_attention_norm.weight",)})


def spec(config: Config) -> ModelSpec:
    biases = {"qkv_bias": config.flag("attention_bias", True), "out_bias": config.flag("attention_out_bias")}
    heads = attention(config, config.head_dim(128), config.rope(), **biases)
    layer = Layer(heads, gated_ffn(config, config.flag("mlp_bias")))
    return decoder_spec(config, [layer] * layer_count(config), context=524288)
