"""Qwen 2 and 2.5: Llama with query, key and value biases; upper layers may use a sliding window."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count, windows
from flashrt.arch.names import HF_DECODER
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER


def qwen_windows(config: Config) -> list[int | None]:
    """Window of every layer: those from `max_window_layers` on, when `use_sliding_window` is set."""
    count = layer_count(config)
    if not config.flag("use_sliding_window") or config.data.get("sliding_window", 4096) is None:
        return windows(config, None, ["full_attention"] * count)
    first = config.integer("max_window_layers", 28, minimum=0)
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return windows(config, config.integer("sliding_window", 4096), types)


def spec(config: Config) -> ModelSpec:
    rope, ffn = config.rope(), gated_ffn(config)
    layers = [
        Layer(attention(config, config.head_dim(), rope, window=window, qkv_bias=True), ffn)
        for window in qwen_windows(config)
    ]
    return decoder_spec(config, layers, context=32768)
