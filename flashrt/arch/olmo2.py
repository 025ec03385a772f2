"""OLMo 2: norms of what blocks give instead of what they are given, QK norm over all heads together.

OLMo 3 has windows beside, in layers whose rotary embedding is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config, rope_from
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count, windows
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER, HF_LAYER
from flashrt.errors import CheckpointError
from flashrt.rope import Rope
from flashrt.spec import Attention, Layer, ModelSpec

NAMES = replace(
    HF_DECODER,
    layer={
        **HF_LAYER,
        "norm.attention_post": ("post_attention_layernorm.weight",),
        "norm.ffn_post": ("post_feedforward_layernorm.weight",),
    },
)


def spec(config: Config) -> ModelSpec:
    return _spec(config, [_heads(config, config.rope())] * layer_count(config))


def spec3(config: Config) -> ModelSpec:
    types = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layer_count(config))]
    sizes = windows(config, config.integer("sliding_window", 4096), types)
    stated = Config(config.object("rope_parameters"), "olmo3")
    if stated.data and set(stated.data) - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"olmo3 config: rope_parameters has {sorted(stated.data)}, expected those of layer types")
    theta = config.number("rope_theta", 5e5)
    scaled = {**stated.object("full_attention"), **config.object("rope_scaling")}
    full, sliding = rope_from(config, scaled, theta), rope_from(config, stated.object("sliding_attention"), theta)
    each = [replace(_heads(config, full if size is None else sliding), window=size) for size in sizes]
    return _spec(config, each)


def _heads(config: Config, rope: Rope) -> Attention:
    bias, norms = config.flag("attention_bias"), {"qk_norm": True, "qk_norm_whole": True}
    return attention(config, config.head_dim(), rope, qkv_bias=bias, out_bias=bias, **norms)


def _spec(config: Config, attentions: Sequence[Attention]) -> ModelSpec:
    ffn, eps = gated_ffn(config), config.number("rms_norm_eps", 1e-5)
    layers = [Layer(heads, ffn) for heads in attentions]
    return decoder_spec(config, layers, context=2048, pre_norms=False, post_norms=True, norm_eps=eps)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """OLMo 3 is OLMo 2 with a window there."""
    window, rope = fields.integer("attention.sliding_window"), config["rope_parameters"]
    if not window:
        return {}
    base = fields.number("rope.freq_base_swa", rope["rope_theta"])
    found = {
        "model_type": "olmo3",
        "sliding_window": window,
        "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_theta": base}},
    }
    pattern = fields.integers("attention.sliding_window_pattern")
    if pattern is not None:
        found["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    return found
