"""Ministral 3, text: Mistral with YaRN, and scores that grow with the logarithm of a query's position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config, rope_from
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.metadata import Metadata
from flashrt.arch.names import HF_DECODER
from flashrt.errors import UnsupportedModelError
from flashrt.rope import yarn_attention
from flashrt.spec import Layer, ModelSpec

NAMES = HF_DECODER
GGUF_KEYS = ("attention.temperature_scale", "rope.scaling.yarn_log_multiplier")

# What transformers' Ministral3Config takes where a config has no rope parameters.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def spec(config: Config) -> ModelSpec:
    parameters = dict(config.object("rope_parameters") or config.object("rope_scaling") or _ROPE)
    rope = rope_from(config, parameters, config.number("rope_theta", 1e6))
    scaling = Config(parameters, "ministral3")
    beta = scaling.number("llama_4_scaling_beta", 0.0)
    span = scaling.integer("original_max_position_embeddings") if beta else 0
    window = config.optional("sliding_window")
    heads = attention(config, config.head_dim(128), rope, temperature=beta, temperature_span=span)
    count, kind = layer_count(config), "full_attention" if window is None else "sliding_attention"
    for name in config.names("layer_types", count) or ():
        if name != kind:  # transformers gives all layers the window
            raise UnsupportedModelError(f"ministral3 with sliding_window={window} and {name!r} layers is not supported")
    layers = [Layer(replace(heads, window=window), gated_ffn(config))] * count
    return decoder_spec(config, layers, context=262144, norm_eps=config.number("rms_norm_eps", 1e-5))


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    rope = dict(config["rope_parameters"])
    if multiplier := fields.number("rope.scaling.yarn_log_multiplier", 0.0):  # mscale_all_dim; mscale is 1
        rope["attention_factor"] /= yarn_attention(rope["factor"], multiplier)
    if beta := fields.number("attention.temperature_scale", 0.0):
        rope["llama_4_scaling_beta"] = beta
    return {"rope_parameters": rope}
