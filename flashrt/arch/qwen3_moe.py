"""Qwen 3 with a mixture of experts in some or all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import EXPERT_NAMES, experts
from flashrt.arch.mixture import gguf as experts_gguf
from flashrt.arch.names import HF_DECODER
from flashrt.errors import CheckpointError
from flashrt.spec import Layer, ModelSpec

NAMES = replace(HF_DECODER, experts=EXPERT_NAMES)


def spec(config: Config) -> ModelSpec:
    config.refuse("use_sliding_window", False)
    bias = config.flag("attention_bias")
    heads = attention(config, config.head_dim(), config.rope(), qkv_bias=bias, out_bias=bias, qk_norm=True)
    # 'num_experts' is written as 'num_local_experts' by some versions of transformers.
    mixture = experts(config, config.integer("num_experts", config.data.get("num_local_experts", 128)))
    layers = [Layer(heads, mixture if sparse else gated_ffn(config)) for sparse in sparse_layers(config)]
    return decoder_spec(config, layers, context=32768)


def sparse_layers(config: Config) -> list[bool]:
    """Whether each layer is a mixture."""
    step = config.integer("decoder_sparse_step", 1)
    dense = config.data.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(item, int) for item in dense):
        raise CheckpointError(f"{config.family} config: mlp_only_layers is {dense!r}, expected layer numbers")
    return [i not in dense and (i + 1) % step == 0 for i in range(layer_count(config))]


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return experts_gguf(config, fields) | {"norm_topk_prob": True}  # llama.cpp always rescales this architecture
