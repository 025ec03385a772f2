"""dots.llm1: QK norm of each head, dense layers first, then mixtures with DeepSeek-V3's router."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, layer_count, windows
from flashrt.arch.mixture import MIXTURE, dense_first, sigmoid_experts
from flashrt.spec import Layer, ModelSpec

NAMES = MIXTURE


def spec(config: Config) -> ModelSpec:
    bias, rope = config.flag("attention_bias"), config.rope()
    window = config.optional("sliding_window") if "sliding_window" in config.data else 4096  # null: none
    first = layer_count(config) if window is None else config.integer("max_window_layers", 62, minimum=0)
    types = ["full_attention" if i < first else "sliding_attention" for i in range(layer_count(config))]
    ffns = dense_first(config, sigmoid_experts(config), 0)
    options = {"qkv_bias": bias, "out_bias": bias, "qk_norm": True}
    layers = [
        Layer(attention(config, config.head_dim(), rope, window=size, **options), ffn)
        for size, ffn in zip(windows(config, window, types), ffns, strict=True)
    ]
    return decoder_spec(config, layers, context=2048)
