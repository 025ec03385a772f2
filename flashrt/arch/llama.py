"""Llama 2, 3 and 3.x, and the many models that share the architecture."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.names import HF_DECODER
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER


def spec(config: Config) -> ModelSpec:
    bias = config.flag("attention_bias")
    heads = attention(config, config.head_dim(), config.rope(), qkv_bias=bias, out_bias=bias)
    layer = Layer(heads, gated_ffn(config, config.flag("mlp_bias")))
    return decoder_spec(config, [layer] * layer_count(config), context=2048)
