"""gpt-oss: attention sinks, windows in every other layer, experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, layer_count, windows
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import experts
from flashrt.arch.mixture import gguf as experts_gguf
from flashrt.arch.names import GGUF_NAMES, HF_DECODER, HF_LAYER, FfnNames
from flashrt.spec import Layer, ModelSpec
from flashrt_kernels.activations import clamped_swiglu

_EXPERTS = "mlp.experts."


def _stacks(end: str, transposed: bool) -> FfnNames:
    fused, down = (f"{_EXPERTS}{name}{end}" for name in ("gate_up_proj", "down_proj"))
    return FfnNames(fused, fused, down, stacked=True, fused=True, interleaved=True, transposed=transposed)


NAMES = replace(
    HF_DECODER,
    layer={
        **HF_LAYER,
        "sinks": ("self_attn.sinks",),
        "router": ("mlp.router.weight",),
        "router.bias": ("mlp.router.bias",),
        "gate.bias": (_EXPERTS + "gate_up_proj_bias",),
        "up.bias": (_EXPERTS + "gate_up_proj_bias",),
        "down.bias": (_EXPERTS + "down_proj_bias",),
    },
    experts=(_stacks("_blocks", False), _stacks("", True)),  # of MXFP4, as published, and plain ones
    interleaved_biases=True,
)
GGUF = replace(
    GGUF_NAMES,
    layer={
        **GGUF_NAMES.layer,
        "norm.ffn": ("post_attention_norm.weight",),
        "sinks": ("attn_sinks.weight",),
        **{f"{part}.bias": (f"ffn_{part}_exps.bias",) for part in ("gate", "up", "down")},
    },
)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def spec(config: Config) -> ModelSpec:
    bias, rope = config.flag("attention_bias", True), _with_rope(config).rope(150000.0)
    heads = attention(config, config.head_dim(64), rope, qkv_bias=bias, out_bias=bias, sinks=True)
    config.refuse("hidden_act", "silu")
    mixture = experts(
        config,
        config.integer("num_local_experts", config.data.get("num_experts", 128)),
        "intermediate_size",
        activation=clamped_swiglu(config.positive("swiglu_alpha", 1.702), config.positive("swiglu_limit", 7.0)),
        bias=True,
        normalize_router=True,  # softmax over the chosen
        router_bias=True,
    )
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layer_count(config))]
    sizes = windows(config, config.integer("sliding_window", 128), types)
    layers = [Layer(replace(heads, window=size), mixture) for size in sizes]
    return decoder_spec(config, layers, context=131072, norm_eps=config.number("rms_norm_eps", 1e-5))


def _with_rope(config: Config) -> Config:
    if config.object("rope_scaling") or config.object("rope_parameters"):
        return config
    return Config({**config.data, "rope_parameters": _YARN}, config.family)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return experts_gguf(config, fields) | {
        "num_local_experts": fields.integer("expert_count"),
        "intermediate_size": fields.integer("expert_feed_forward_length"),
        "sliding_window": fields.integer("attention.sliding_window"),
        "rope_parameters": {**config["rope_parameters"], "truncate": False},  # not in the file: so it was trained
        "attention_bias": False,  # what there is says the file itself
    }
