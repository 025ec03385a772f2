"""Llama 4, text: NoPE layers with a temperature, unit queries and keys elsewhere, a router that weighs the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import experts
from flashrt.arch.mixture import gguf as experts_gguf
from flashrt.arch.names import HF_DECODER, HF_LAYER, FfnNames, gated_names
from flashrt.arch.smollm3 import rotates
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import Ffn, Layer, ModelSpec

_BLOCK = "feed_forward."


_STACK = _BLOCK + "experts.gate_up_proj", _BLOCK + "experts.gate_up_proj", _BLOCK + "experts.down_proj"
NAMES = replace(
    HF_DECODER,
    layer={**HF_LAYER, "router": (_BLOCK + "router.weight",)},
    dense=(gated_names(_BLOCK),),
    experts=(FfnNames(*_STACK, stacked=True, fused=True, transposed=True),),
    shared_expert=(gated_names(_BLOCK + "shared_expert."),),
    permuted=True,
)
GGUF_KEYS = ("interleave_moe_layer_step",)


def spec(config: Config) -> ModelSpec:
    config = _as_read_today(config)
    bias, rotating = config.flag("attention_bias"), rotates(config)
    heads = attention(config, config.head_dim(128), config.rope(5e5), qkv_bias=bias, out_bias=bias)
    scaled = config.number("attn_scale", 0.1) if config.flag("attn_temperature_tuning", True) else 0.0
    near = replace(heads, qk_unit=config.flag("use_qk_norm", True))
    span = config.integer("floor_scale", 8192) if scaled else 0
    far = replace(heads, rope=None, temperature=scaled, temperature_span=span, temperature_first=1 if scaled else 0)
    ffns = [_mixture(config) if sparse else _dense(config) for sparse in _sparse_layers(config)]
    layers = [Layer(near if rotated else far, ffn) for rotated, ffn in zip(rotating, ffns, strict=True)]
    model = decoder_spec(config, layers, context=131072, norm_eps=config.number("rms_norm_eps", 1e-5))
    chunk = _chunk(config, model.context)
    return replace(model, context=chunk, longest=chunk) if chunk < model.context else model


def _as_read_today(config: Config) -> Config:
    """What published configurations say in ways of their own: an empty list for the usual one, a number for yes."""
    tuned = config.data.get("attn_temperature_tuning")
    own = {"no_rope_layers": config.data.get("no_rope_layers") or None}
    own["attn_temperature_tuning"] = bool(tuned) if type(tuned) is int else tuned
    return Config({**config.data, **own}, config.family)


def _chunk(config: Config, context: int) -> int:
    """Tokens up to which layers that attend to chunks attend to everything: no more are computed."""
    kinds = set(config.names("layer_types", layer_count(config)) or ["chunked_attention"])
    if kinds - {"chunked_attention", "full_attention"}:
        raise CheckpointError(f"llama4 config: layer_types names {sorted(kinds)}")
    chunked = "chunked_attention" in kinds and config.data.get("attention_chunk_size", 0) is not None
    return config.integer("attention_chunk_size", 8192) if chunked else context


def _mixture(config: Config) -> Ffn:
    options = {"router_scores": "sigmoid", "router_input": True, "shared": config.integer("intermediate_size")}
    return experts(config, config.integer("num_local_experts", 16), "intermediate_size", **options)


def _dense(config: Config) -> Ffn:
    return Ffn(config.integer("intermediate_size_mlp"), config.activation("hidden_act", "silu"))


def _sparse_layers(config: Config) -> list[bool]:
    step, count = config.integer("interleave_moe_layer_step", 1), layer_count(config)
    stated = config.data.get("moe_layers")
    if stated is None:
        return [(i + 1) % step == 0 for i in range(count)]
    if not isinstance(stated, list) or not all(type(item) is int for item in stated):
        raise CheckpointError(f"llama4 config: moe_layers is {stated!r:.80}, expected layer numbers")
    return [i in stated for i in range(count)]


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    count = fields.integer("expert_count")
    if fields.integer("attention.sliding_window", 8192) == 0:
        raise UnsupportedModelError("GGUF llama4 with attention.sliding_window=0 is not supported")
    return experts_gguf(config, fields) | {
        "num_local_experts": count,
        "intermediate_size": fields.integer("expert_feed_forward_length"),
        "intermediate_size_mlp": config["intermediate_size"],
        "interleave_moe_layer_step": fields.integer("interleave_moe_layer_step", 1),
        "use_qk_norm": count != 128,  # not in the file: llama.cpp knows Maverick by its experts
    }
