"""OLMoE: QK norm over all heads together, a mixture of experts in every layer."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, layer_count
from flashrt.arch.mixture import MIXTURE, experts
from flashrt.spec import Layer, ModelSpec

NAMES = MIXTURE


def spec(config: Config) -> ModelSpec:
    config.refuse("clip_qkv")
    bias = config.flag("attention_bias")
    norms = {"qk_norm": True, "qk_norm_whole": True}
    heads = attention(config, config.head_dim(), config.rope(), qkv_bias=bias, out_bias=bias, **norms)
    count = config.integer("num_experts", config.data.get("num_local_experts", 64))
    layers = [Layer(heads, experts(config, count, "intermediate_size"))] * layer_count(config)
    return decoder_spec(config, layers, context=4096, norm_eps=config.number("rms_norm_eps", 1e-5))
