"""GLM-4, dense: sandwich norms, interleaved rotary embedding of half a head, gate and up fused."""

from __future__ import annotations

from dataclasses import replace

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.names import GGUF_FUSED, GGUF_PERMUTED, HF_DECODER, HF_FUSED, HF_LAYER
from flashrt.spec import Layer, ModelSpec

NAMES = replace(
    HF_DECODER,
    layer={
        **HF_LAYER,
        "norm.attention_post": ("post_self_attn_layernorm.weight",),
        "norm.ffn_post": ("post_mlp_layernorm.weight",),
    },
    dense=(HF_FUSED,),
    permuted=True,
)
GGUF = replace(GGUF_PERMUTED, dense=(GGUF_FUSED,))


def spec(config: Config) -> ModelSpec:
    dim = config.head_dim(128)
    heads = attention(config, dim, config.partial_rope(dim, 0.5), qkv_bias=config.flag("attention_bias", True))
    layers = [Layer(heads, gated_ffn(config))] * layer_count(config)
    options = {"post_norms": True, "norm_eps": config.number("rms_norm_eps", 1.5625e-7)}
    return decoder_spec(config, layers, context=131072, **options)
