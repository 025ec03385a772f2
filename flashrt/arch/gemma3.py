"""Gemma 3, text: sandwich norms of 1 + w, scaled embeddings, five sliding layers to each global one."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config, rope_from
from flashrt.arch.decoder import attention, decoder_spec, layer_count, windows
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER, HF_LAYER
from flashrt.errors import CheckpointError
from flashrt.rope import Rope
from flashrt.spec import MAX_LAYERS, Ffn, Layer, ModelSpec

NAMES = replace(
    HF_DECODER,
    layer={
        **HF_LAYER,
        "norm.attention_post": ("post_attention_layernorm.weight",),
        "norm.ffn": ("pre_feedforward_layernorm.weight",),
        "norm.ffn_post": ("post_feedforward_layernorm.weight",),
    },
    norm_add=1.0,
)

# Gemma's published configs leave out what equals the defaults of transformers' Gemma3TextConfig.
_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def spec(config: Config) -> ModelSpec:
    outer = config.data
    inner = outer.get("text_config", outer)
    if not isinstance(inner, dict):
        raise CheckpointError(f"gemma3 config: text_config is {inner!r}, expected an object")
    inherited = {key: outer[key] for key in ("dtype", "torch_dtype", "eos_token_id", "bos_token_id") if outer.get(key)}
    text = Config({**_DEFAULTS, **inherited, **{k: v for k, v in inner.items() if v is not None}}, "gemma3")
    text.refuse("use_bidirectional_attention", False)
    scalar = text.positive("query_pre_attn_scalar", 256)
    bias = text.flag("attention_bias")
    ffn = Ffn(text.integer("intermediate_size"), text.activation("hidden_activation", "gelu_pytorch_tanh"))
    full, sliding = _ropes(text)
    layers = [
        Layer(
            attention(
                text,
                text.head_dim(256),
                full if window is None else sliding,
                scale=scalar**-0.5,
                window=window,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm=True,
            ),
            ffn,
        )
        for window in _windows(text)
    ]
    return decoder_spec(text, layers, post_norms=True, tied=True, embed_scale=embed_scale(text))


def _windows(config: Config) -> list[int | None]:
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    types = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layer_count(config))]
    return windows(config, config.integer("sliding_window"), types)


def _ropes(config: Config) -> tuple[Rope, Rope]:
    """(global, local). Scaling applies to the global layers only."""
    parameters = Config(config.object("rope_parameters"), "gemma3")
    full = {**parameters.object("full_attention"), **config.object("rope_scaling")}
    sliding = parameters.object("sliding_attention")
    return (
        rope_from(config, full, config.number("rope_theta", 1e6)),
        rope_from(config, sliding, config.number("rope_local_base_freq", 1e4)),
    )


def embed_scale(config: Config, width: str = "hidden_size") -> float:
    """The root of field `width`, rounded as transformers does: to the type of the embedding table."""
    scale = math.sqrt(config.integer(width))
    dtype = config.data.get("dtype") or config.data.get("torch_dtype")
    scale = struct.unpack("<f", struct.pack("<f", scale))[0]
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", scale))[0]
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", bits))[0])
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", scale))[0])
    return float(scale)


def query_scalar(config: Mapping[str, Any], layers_of_27b: int) -> int:
    """llama.cpp knows the 27B model, which alone scales by hidden / heads, by its layers."""
    is_27b = config["num_hidden_layers"] == layers_of_27b
    return int(config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"])


def layer_types(config: Mapping[str, Any], fields: Metadata) -> list[str]:
    """Of every layer of a GGUF file."""
    layers = config["num_hidden_layers"]
    if layers is None or not 0 < layers <= MAX_LAYERS:
        raise CheckpointError(f"GGUF metadata: block_count is {layers!r}")
    pattern = fields.per_layer("attention.sliding_window_pattern")
    if pattern is None or isinstance(pattern, int):
        period = 6 if pattern is None else max(pattern, 1)
        pattern = [(i + 1) % period for i in range(layers)]
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern]


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return {
        "layer_types": layer_types(config, fields),
        "sliding_window": fields.integer("attention.sliding_window"),
        "query_pre_attn_scalar": query_scalar(config, 62),
        "rope_parameters": {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_theta": fields.number("rope.freq_base_swa", 10000.0)},
        },
    }
