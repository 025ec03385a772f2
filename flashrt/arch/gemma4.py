"""Gemma 4, text: Gemma 3 with heads of another width, and values that are keys, in layers that see everything.

The E-series has layer inputs, and layers at its end that attend to the keys and values of others; the mixture has
experts beside each dense block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config, rope_from
from flashrt.arch.decoder import attention, decoder_spec, layer_count
from flashrt.arch.gemma3 import embed_scale
from flashrt.arch.names import GGUF_NAMES, HF_DECODER, HF_LAYER, FfnNames
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.rope import Rope
from flashrt.spec import MOST_EXPERTS, Attention, Ffn, Layer, ModelSpec

NAMES = replace(
    HF_DECODER,
    shared={
        **HF_DECODER.shared,
        "inputs.embed": "embed_tokens_per_layer.weight",
        "inputs.project": "per_layer_model_projection.weight",
        "norm.inputs": "per_layer_projection_norm.weight",
    },
    layer={
        **HF_LAYER,
        "norm.attention_post": ("post_attention_layernorm.weight",),
        "norm.ffn": ("pre_feedforward_layernorm.weight",),
        "norm.ffn_post": ("post_feedforward_layernorm.weight",),
        "input_gate": ("per_layer_input_gate.weight",),
        "input_out": ("per_layer_projection.weight",),
        "norm.input_post": ("post_per_layer_input_norm.weight",),
        "scale": ("layer_scalar",),
        "router": ("router.proj.weight",),
        "router.scales": ("router.per_expert_scale",),
        "norm.router": ("router.scale",),
        "norm.experts": ("pre_feedforward_layernorm_2.weight",),
        "norm.experts_post": ("post_feedforward_layernorm_2.weight",),
        "norm.shared_post": ("post_feedforward_layernorm_1.weight",),
    },
    experts=(FfnNames("experts.gate_up_proj", "experts.gate_up_proj", "experts.down_proj", stacked=True, fused=True),),
    shared_expert=HF_DECODER.dense,
)
GGUF = replace(
    GGUF_NAMES,
    shared={
        **GGUF_NAMES.shared,
        "inputs.embed": "per_layer_token_embd.weight",
        "inputs.project": "per_layer_model_proj.weight",
        "norm.inputs": "per_layer_proj_norm.weight",
    },
    layer={
        **GGUF_NAMES.layer,
        "input_gate": ("inp_gate.weight",),
        "input_out": ("proj.weight",),
        "norm.input_post": ("post_norm.weight",),
        "scale": ("layer_output_scale.weight",),
        "router.scales": ("ffn_down_exps.scale",),
        "norm.router": ("ffn_gate_inp.scale",),
        "norm.experts": ("pre_ffw_norm_2.weight",),
        "norm.experts_post": ("post_ffw_norm_2.weight",),
        "norm.shared_post": ("post_ffw_norm_1.weight",),
    },
    shared_expert=GGUF_NAMES.dense,
)
FULL, SLIDING = "full_attention", "sliding_attention"

# What transformers' Gemma4TextConfig takes for what a config leaves out.
_DEFAULTS = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_ROPES: dict[str, dict[str, Any]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


# The same of its Gemma4UnifiedTextConfig, which has neither layer inputs nor experts.
_UNIFIED = {"max_position_embeddings": 262144, "sliding_window": 1024, "hidden_size_per_layer_input": 0}


def spec(config: Config) -> ModelSpec:
    return _spec(config, _DEFAULTS)


def unified_spec(config: Config) -> ModelSpec:
    return _spec(config, _DEFAULTS | _UNIFIED)


def _spec(config: Config, defaults: dict[str, Any]) -> ModelSpec:
    stated = {key: value for key, value in config.data.items() if value is not None}
    text = Config({**defaults, **stated}, "gemma4")
    text.refuse("use_bidirectional_attention", "vision")  # which text is not
    layers = [Layer(own, _ffn(text, own)) for own in _attentions(text)]
    options = {"embed_scale": embed_scale(text), "logit_softcap": text.cap("final_logit_softcapping")}
    return decoder_spec(text, layers, post_norms=True, tied=True, layer_scales=True, **options, **_inputs(text))


def _inputs(config: Config) -> dict[str, Any]:
    """What the spec says of layer inputs."""
    width = config.integer("hidden_size_per_layer_input", minimum=0)
    if width == 0:
        return {}
    vocab, rows = config.integer("vocab_size"), config.integer("vocab_size_per_layer_input")
    if rows != vocab:
        raise UnsupportedModelError(f"gemma4 with per-layer embeddings of {rows} of {vocab} tokens is not supported")
    return {"layer_inputs": width, "layer_input_scale": embed_scale(config, "hidden_size_per_layer_input")}


def _ffn(config: Config, attention: Attention) -> Ffn:
    wide = config.flag("use_double_wide_mlp") and attention.kv_from is not None
    neurons = config.integer("intermediate_size") * (2 if wide else 1)
    activation = config.activation("hidden_activation", "gelu_pytorch_tanh")
    if not config.flag("enable_moe_block"):
        return Ffn(neurons, activation)
    experts = config.integer("num_experts", maximum=MOST_EXPERTS)
    return Ffn(
        config.integer("moe_intermediate_size"),
        activation,
        experts=experts,
        experts_per_token=config.integer("top_k_experts", maximum=experts),
        normalize_router=True,
        router_norm=True,
        router_logit_scale=config.integer("hidden_size") ** -0.5,
        expert_scales=True,
        shared=neurons,
        branch_norms=True,
    )


def _attentions(config: Config) -> list[Attention]:
    """Of every layer. Those of one kind are alike, but for the last, which attend to what one before them keeps."""
    types, bias = _layer_types(config), config.flag("attention_bias")
    shapes, ropes = _shapes(config, types), _ropes(config)
    window = config.integer("sliding_window")
    kinds = {
        kind: attention(
            Config({**config.data, **shapes[kind]}, config.family),
            shapes[kind]["head_dim"],
            ropes[kind],
            scale=1.0,
            window=window if kind == SLIDING else None,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=True,
            value_norm=True,
            keys_as_values=kind == FULL and config.flag("attention_k_eq_v"),
        )
        for kind in set(types)
    }
    shared = config.integer("num_kv_shared_layers", 0, minimum=0, maximum=len(types) - 1)
    own, others = types[: len(types) - shared], types[len(types) - shared :]
    if missing := set(others) - set(own):
        raise CheckpointError(
            f"gemma4 config: no {min(missing)} layer is before the {shared} that share keys and values"
        )
    last = {kind: i for i, kind in enumerate(own)}
    return [kinds[kind] for kind in own] + [replace(kinds[kind], kv_from=last[kind]) for kind in others]


def _layer_types(config: Config) -> list[str]:
    """Of every layer; the last sees everything, whatever is said of it."""
    count = layer_count(config)
    found = config.names("layer_types", count) or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    for name in found:
        if name not in (FULL, SLIDING):
            raise UnsupportedModelError(f"gemma4 with {name!r} layers is not supported")
    return [*found[:-1], FULL]


def _shapes(config: Config, types: list[str]) -> dict[str, dict[str, int]]:
    """Size of a head, and KV heads, by kind of layer.

    Published configs say what differs by names of their own; transformers saves it by layer.
    """
    common = {"head_dim": config.head_dim(), "num_key_value_heads": config.heads()[1]}
    if "per_layer_config" not in config.data:
        own = {"head_dim": config.integer("global_head_dim", maximum=1 << 16)}
        if config.flag("attention_k_eq_v") and config.data.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = config.integer("num_global_key_value_heads", maximum=1 << 16)
        return {SLIDING: common, FULL: common | own}
    by_layer = Config(config.object("per_layer_config"), config.family)
    result: dict[str, dict[str, int]] = {}
    for i, kind in enumerate(types):
        layer = Config(by_layer.object(str(i)), config.family)
        if odd := set(layer.data) - set(common):
            raise UnsupportedModelError(f"gemma4 with {min(odd)!r} in per_layer_config is not supported")
        own = common | {key: layer.integer(key, maximum=1 << 16) for key in layer.data}
        if result.setdefault(kind, own) != own:
            raise UnsupportedModelError(f"gemma4 whose {kind} layers have heads of different kinds is not supported")
    return result


def _ropes(config: Config) -> dict[str, Rope]:
    """By kind of layer."""
    parameters = Config(config.object("rope_parameters") or _ROPES, config.family)
    if missing := [kind for kind in _ROPES if not parameters.object(kind)]:
        raise CheckpointError(f"gemma4 config: rope_parameters say nothing of {missing[0]}")
    return {kind: rope_from(config, parameters.object(kind), own["rope_theta"]) for kind, own in _ROPES.items()}
