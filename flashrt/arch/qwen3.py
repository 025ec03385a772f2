"""Qwen 3: queries and keys are normed per head, no biases."""

from __future__ import annotations

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn
from flashrt.arch.names import HF_DECODER
from flashrt.arch.qwen2 import qwen_windows
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER


def spec(config: Config) -> ModelSpec:
    rope, ffn, bias = config.rope(), gated_ffn(config), config.flag("attention_bias")
    layers = [
        Layer(
            attention(config, config.head_dim(128), rope, window=window, qkv_bias=bias, out_bias=bias, qk_norm=True),
            ffn,
        )
        for window in qwen_windows(config)
    ]
    return decoder_spec(config, layers, context=32768)
