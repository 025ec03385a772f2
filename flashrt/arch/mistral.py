"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count, windows
from flashrt.arch.names import HF_DECODER
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER


def spec(config: Config) -> ModelSpec:
    # Absent means 4096 and null means none: the field's default in transformers is the first Mistral's.
    window = config.data.get("sliding_window", 4096)
    if window is not None:
        window = config.integer("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    rope, ffn = config.rope(), gated_ffn(config)
    layers = [
        Layer(attention(config, config.head_dim(), rope, window=size), ffn)
        for size in windows(config, window, [kind] * layer_count(config))
    ]
    return decoder_spec(config, layers, context=131072)
