"""Qwen 1.5 and 2 mixtures: a shared expert behind a gate of its own, beside those that the router names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, windows
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import experts
from flashrt.arch.mixture import gguf as experts_gguf
from flashrt.arch.names import HF_LAYER, gated_names
from flashrt.arch.qwen3_moe import NAMES as QWEN3_MOE
from flashrt.arch.qwen3_moe import sparse_layers
from flashrt.spec import Layer, ModelSpec

NAMES = replace(
    QWEN3_MOE,
    layer={**HF_LAYER, "shared_gate": ("mlp.shared_expert_gate.weight",)},
    shared_expert=(gated_names("mlp.shared_expert."),),
)


def spec(config: Config) -> ModelSpec:
    bias, rope, sparse = config.flag("qkv_bias", True), config.rope(), sparse_layers(config)
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window") else None
    first = config.integer("max_window_layers", 28, minimum=0)
    slides = [window is not None and i % 2 == 0 and i < first for i in range(len(sparse))]
    types = ["sliding_attention" if own else "full_attention" for own in slides]
    count = config.integer("num_experts", config.data.get("num_local_experts", 60))
    shared = config.integer("shared_expert_intermediate_size", 5632)
    mixture = experts(config, count, shared=shared, shared_gate=True)
    ffns = [mixture if own else gated_ffn(config) for own in sparse]
    layers = [
        Layer(attention(config, config.head_dim(), rope, window=size, qkv_bias=bias), ffn)
        for size, ffn in zip(windows(config, window, types), ffns, strict=True)
    ]
    return decoder_spec(config, layers, context=32768)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    shared = fields.integer("expert_shared_feed_forward_length")
    return experts_gguf(config, fields) | {"shared_expert_intermediate_size": shared}
