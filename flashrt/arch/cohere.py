"""Command R: a layer norm without bias feeds attention and FFN side by side, interleaved rotary, scaled logits.

Command R7B (cohere2) rotates in layers that see a window, and sees everything in those that do not rotate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count, windows
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER
from flashrt.spec import Attention, Layer, ModelSpec

NAMES = replace(HF_DECODER, permuted=True)


def spec(config: Config) -> ModelSpec:
    config.refuse("use_qk_norm", False)
    return _spec(config, [_heads(config, 5e5)] * layer_count(config))


def spec2(config: Config) -> ModelSpec:
    heads = _heads(config, 1e4)
    step = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 4))
    types = ["full_attention" if (i + 1) % step == 0 else "sliding_attention" for i in range(layer_count(config))]
    sizes = windows(config, config.integer("sliding_window", 4096), types)
    return _spec(config, [replace(heads, window=size, rope=None if size is None else heads.rope) for size in sizes])


def _heads(config: Config, theta: float) -> Attention:
    bias = config.flag("attention_bias")
    return attention(config, config.head_dim(), config.rope(theta), qkv_bias=bias, out_bias=bias)


def _spec(config: Config, attentions: Sequence[Attention]) -> ModelSpec:
    options = {
        "norm": "layer",
        "norm_bias": False,
        "norm_eps": config.number("layer_norm_eps", 1e-5),
        "parallel": True,
        "logit_scale": config.positive("logit_scale", 0.0625),
    }
    ffn = gated_ffn(config)
    return decoder_spec(config, [Layer(heads, ffn) for heads in attentions], context=8192, tied=True, **options)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return {
        "layer_norm_eps": fields.number("attention.layer_norm_epsilon"),
        "logit_scale": fields.number("logit_scale", 0.0) or 1.0,  # without one llama.cpp does not scale
        "sliding_window": fields.integer("attention.sliding_window"),
    }
