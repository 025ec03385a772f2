"""OLMo 2: norms of what blocks give instead of what they are given, QK norm over all heads together."""

from __future__ import annotations

from dataclasses import replace

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.names import HF_DECODER, HF_LAYER
from flashrt.spec import Layer, ModelSpec

NAMES = replace(
    HF_DECODER,
    layer={
        **HF_LAYER,
        "norm.attention_post": ("post_attention_layernorm.weight",),
        "norm.ffn_post": ("post_feedforward_layernorm.weight",),
    },
)


def spec(config: Config) -> ModelSpec:
    bias, norms = config.flag("attention_bias"), {"qk_norm": True, "qk_norm_whole": True}
    heads = attention(config, config.head_dim(), config.rope(), qkv_bias=bias, out_bias=bias, **norms)
    layers = [Layer(heads, gated_ffn(config))] * layer_count(config)
    options = {"pre_norms": False, "post_norms": True, "norm_eps": config.number("rms_norm_eps", 1e-5)}
    return decoder_spec(config, layers, context=2048, **options)
