"""GGUF metadata → a config with Hugging Face's field names, so that one family file serves both formats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flashrt.arch import (
    cohere,
    deepseek,
    ernie4_5_moe,
    gemma2,
    gemma3,
    gemma4_gguf,
    glm4_moe,
    gpt_oss,
    granite,
    llama4,
    ministral3,
    mixture,
    olmo2,
    phi3,
    qwen2_moe,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
)
from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.rope import yarn_attention
from flashrt.spec import MAX_LAYERS, Attention, ModelSpec

_PATTERN = "attention.sliding_window_pattern"


@dataclass(frozen=True, slots=True)
class _Architecture:
    """One of llama.cpp's: the family that it is.

    read: gives the fields of a config that not every family has; keys: those that this takes, of those refused else
    """

    model_type: str
    read: Callable[[Mapping[str, Any], Metadata], dict[str, Any]] = lambda config, fields: {}
    keys: Collection[str] = ()
    partial: bool = False  # a part of each head may be rotated
    latent: bool = False  # sizes of heads are those of latent attention, which `read` checks
    by_layer: Collection[str] = ()  # fields of _LAYER_FIELDS that `read` gives


def _llama(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    found: dict[str, Any] = {"sliding_window": fields.integer("attention.sliding_window")}
    if experts := fields.integer("expert_count"):
        found |= {"model_type": "mixtral", "num_local_experts": experts}
        found["num_experts_per_tok"] = fields.integer("expert_used_count")
    return found


def _mistral(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return {"sliding_window": fields.integer("attention.sliding_window")}


ARCHITECTURES = {
    "llama": _Architecture("llama", _llama),
    "llama4": _Architecture("llama4_text", llama4.gguf, llama4.GGUF_KEYS),
    "mistral": _Architecture("mistral", _mistral),
    "qwen2": _Architecture("qwen2"),
    "qwen3": _Architecture("qwen3"),
    "qwen35": _Architecture("qwen3_5_text", qwen3_5.gguf, qwen3_5.GGUF_KEYS, partial=True),
    "qwen35moe": _Architecture("qwen3_5_moe_text", qwen3_next.moe_gguf, qwen3_next.GGUF_KEYS, partial=True),
    "qwen3next": _Architecture("qwen3_next", qwen3_next.gguf, qwen3_next.GGUF_KEYS, partial=True),
    "qwen2moe": _Architecture("qwen2_moe", qwen2_moe.gguf, mixture.GGUF_KEYS),
    "qwen3moe": _Architecture("qwen3_moe", qwen3_moe.gguf),
    "gemma2": _Architecture("gemma2", gemma2.gguf, gemma2.GGUF_KEYS),
    "gemma3": _Architecture("gemma3_text", gemma3.gguf, (_PATTERN,)),
    "gemma4": _Architecture("gemma4_text", gemma4_gguf.gguf, gemma4_gguf.KEYS, by_layer=gemma4_gguf.BY_LAYER),
    "phi3": _Architecture("phi3", phi3.gguf, partial=True),
    "olmo2": _Architecture("olmo2", olmo2.gguf, (_PATTERN,)),
    "granite": _Architecture("granite", granite.gguf, granite.GGUF_KEYS),
    "granitemoe": _Architecture("granitemoe", granite.moe_gguf, granite.MOE_GGUF_KEYS),
    "gpt-oss": _Architecture("gpt_oss", gpt_oss.gguf),
    "olmoe": _Architecture("olmoe", mixture.gguf),
    "deepseek2": _Architecture("deepseek_v3", deepseek.gguf, deepseek.GGUF_KEYS, latent=True),
    "dots1": _Architecture("dots1", mixture.sigmoid_gguf, mixture.GGUF_ROUTER_KEYS),
    "ernie4_5-moe": _Architecture("ernie4_5_moe", ernie4_5_moe.gguf, ernie4_5_moe.GGUF_KEYS),
    "glm4moe": _Architecture("glm4_moe", glm4_moe.gguf, glm4_moe.GGUF_KEYS, partial=True),
    "smollm3": _Architecture("smollm3"),
    "glm4": _Architecture("glm4", partial=True),
    "seed_oss": _Architecture("seed_oss"),
    "mistral3": _Architecture("ministral3", ministral3.gguf, ministral3.GGUF_KEYS),
    "command-r": _Architecture("cohere", cohere.gguf, ("logit_scale",)),
    "cohere2": _Architecture("cohere2", cohere.gguf, ("logit_scale",)),
}
_FIELDS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "head_dim": "attention.key_length",
}
_LAYER_FIELDS = {  # may be given for each layer
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
}
# Fields that would change results, and that few families or none read.
_REFUSED = (
    "attention.alibi_bias_max",
    "attention.clamp_kqv",
    "attention.logit_softcapping",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "expert_shared_count",
    "expert_group_count",
    "leading_dense_block_count",
    "interleave_moe_layer_step",
    "nextn_predict_layers",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.output_scale",
    _PATTERN,
    "attention.temperature_scale",
    "attention.temperature_length",
    "attention.shared_kv_layers",
    "embedding_length_per_layer_input",
    "deepstack_mapping",
    "expert_shared_feed_forward_length",
    "rope.dimension_sections",
)
# Tensors of factors that divide the rotary frequencies: Llama 3.x's, and the two of longrope.
ROPE_FREQS = "rope_freqs.weight"
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
ROPE_FACTORS = (ROPE_FREQS, *LONGROPE_FACTORS)
_STILL = 1e20  # a factor beyond this leaves its pair unrotated in any context
# Numbers that change results in ways that few families or none compute, with the value that changes nothing.
_NEUTRAL = {
    "expert_gating_func": 1,  # softmax
    "expert_weights_scale": 1.0,
    "rope.scaling.alpha": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}


def gguf_config(
    metadata: Mapping[str, Any],
    shape: Callable[[str], Sequence[int] | None],
    rope_factors: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """The config of a GGUF file.

    shape: (rows, columns) or (length,) of the tensor of a name, None where the file has none
    rope_factors: the values of those of ROPE_FACTORS that the file has, which divide the rotary frequencies
    """
    values = Metadata(metadata)
    name = values.string("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(f"GGUF architecture {name!r} is not supported; known: {known}")
    own, fields = ARCHITECTURES[name], values.below(f"{name}.")
    for key in _REFUSED:
        if key not in own.keys and fields.get(key):
            raise UnsupportedModelError(f"GGUF {name} with {key}={fields.get(key)!r:.80} is not supported")
    config: dict[str, Any] = {ours: fields.integer(theirs) for ours, theirs in _FIELDS.items()}
    uniform = {ours: theirs for ours, theirs in _LAYER_FIELDS.items() if ours not in own.by_layer}
    config |= {ours: _of_all_layers(fields, theirs) for ours, theirs in uniform.items()}
    config |= {
        "model_type": own.model_type,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": _rows(shape, "token_embd.weight"),
        "tie_word_embeddings": shape("output.weight") is None,
        "bos_token_id": values.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(values.below("tokenizer.ggml.")),
        "use_qk_norm": shape("blk.0.attn_q_norm.weight") is not None,
        "layers_without_values": _without_values(config["num_hidden_layers"] or 0, shape),
    }
    rotary = fields.integer("rope.dimension_count", 0) if own.latent else _check_heads(config, fields, own.partial)
    for key, neutral in _NEUTRAL.items():
        if key not in own.keys and (found := fields.number(key, neutral)) != neutral:
            raise UnsupportedModelError(f"GGUF with {key}={found} is not supported")
    config["rope_parameters"] = _rope(config, fields, rope_factors, rotary)
    return config | own.read(config, fields)


def with_biases(spec: ModelSpec, has: Callable[[str], bool]) -> ModelSpec:
    """The spec with the biases of attention and dense feed-forward blocks that the file holds: GGUF says by their
    presence which there are."""
    layers = []
    for i, layer in enumerate(spec.layers):
        if not layer.ffn.experts and any(has(f"blk.{i}.ffn_{name}.bias") for name in ("gate", "up", "down")):
            layer = replace(layer, ffn=replace(layer.ffn, bias=True))
        attention = layer.mixer
        if not isinstance(attention, Attention) or attention.output_gate:  # beside which llama.cpp adds none
            layers.append(layer)
            continue
        qkv = attention.qkv_bias or any(has(f"blk.{i}.attn_{name}.bias") for name in ("q", "k", "v", "qkv"))
        out = attention.out_bias or has(f"blk.{i}.attn_output.bias")
        layers.append(replace(layer, mixer=replace(attention, qkv_bias=qkv, out_bias=out)))
    return replace(spec, layers=tuple(layers))


def _rows(shape: Callable[[str], Sequence[int] | None], name: str) -> int:
    found = shape(name)
    if found is None or len(found) != 2:
        raise CheckpointError(f"the GGUF file has no matrix {name}")
    return found[0]


def _without_values(layers: int, shape: Callable[[str], Sequence[int] | None]) -> list[int]:
    """Layers with a projection to keys and none to values."""
    known = range(min(layers, MAX_LAYERS))
    return [i for i in known if shape(f"blk.{i}.attn_k.weight") and not shape(f"blk.{i}.attn_v.weight")]


def _eos(fields: Metadata) -> list[int]:
    ids = [fields.integer(f"{key}_token_id") for key in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for i in ids if i is not None))


def _of_all_layers(fields: Metadata, key: str) -> int | None:
    value = fields.per_layer(key)
    if value is None or isinstance(value, int):
        return value
    if len(set(value)) != 1:
        raise UnsupportedModelError(f"GGUF with a different {key} per layer is not supported")
    return value[0]


def _check_heads(config: dict[str, Any], fields: Metadata, partial: bool) -> int:
    """Check the sizes of heads, and give `config` the size of one. Returns how many numbers of it are rotated."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if not heads or not hidden or heads < 1:
        raise CheckpointError(f"GGUF metadata: head_count is {heads!r} and embedding_length {hidden!r}")
    if config["head_dim"] is None:
        config["head_dim"] = hidden // heads
    dim = config["head_dim"]
    rotary = fields.integer("rope.dimension_count", dim)
    if partial and 0 < rotary <= dim:
        # Half a number more, so that int() of its product with dim is exact.
        config["partial_rotary_factor"] = 1.0 if rotary == dim else (rotary + 0.5) / dim
        dims = {"attention.value_length": fields.integer("attention.value_length", dim)}
    else:
        dims = {key: fields.integer(key, dim) for key in ("attention.value_length", "rope.dimension_count")}
    for key, found in dims.items():
        if found != dim:
            raise UnsupportedModelError(f"GGUF with {key}={found} but head size {dim} is not supported")
    return rotary


def _rope(
    config: Mapping[str, Any], fields: Metadata, factors: Mapping[str, Sequence[float]], rotary: int
) -> dict[str, Any]:
    kind = fields.string("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedModelError(
            f"GGUF with rope scaling {kind!r} is not supported; known: none, linear, yarn, longrope"
        )
    for name, values in factors.items():
        if (kind == "longrope") != (name in LONGROPE_FACTORS) or (kind != "none" and name == ROPE_FREQS):
            raise UnsupportedModelError(f"GGUF with {name} and rope scaling {kind!r} is not supported")
        if len(values) != rotary // 2:
            raise CheckpointError(f"GGUF with {len(values)} numbers in {name}, expected {rotary // 2}")
    theta = fields.number("rope.freq_base", 10000.0)
    return {"rope_theta": theta} | _scaling(kind, config, fields, factors, theta)


def _scaling(
    kind: str, config: Mapping[str, Any], fields: Metadata, factors: Mapping[str, Sequence[float]], theta: float
) -> dict[str, Any]:
    if kind == "none":
        if ROPE_FREQS in factors:
            return proportional_parameters(factors[ROPE_FREQS]) or llama3_parameters(factors[ROPE_FREQS], theta)
        # Files older than the scaling type say it with a scale alone.
        scale = fields.number("rope.scale_linear", 1.0)
        return {"rope_type": "linear", "factor": scale} if scale not in (0, 1) else {}
    factor = fields.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    result = {
        "rope_type": kind,
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
    }
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        return result | {
            "factor": factor,
            "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
            "attention_factor": attention * yarn_attention(factor),
        }
    if factor != 1.0:
        raise UnsupportedModelError(f"GGUF with rope.scaling.factor={factor} beside longrope is not supported")
    for name in LONGROPE_FACTORS:
        if name not in factors:
            raise CheckpointError(f"GGUF with rope scaling 'longrope' has no {name}")
    short, long = (list(factors[name]) for name in LONGROPE_FACTORS)
    return result | {"short_factor": short, "long_factor": long, "attention_factor": attention}


def proportional_parameters(factors: Sequence[float]) -> dict[str, Any]:
    """The rope parameters of heads of which the first pairs alone are rotated; none where factors say otherwise.

    llama.cpp's converter has the others rotate by 1e-30 of what they would.
    """
    pairs = sum(factor == 1 for factor in factors)
    if not 0 < pairs < len(factors) or any(factor < _STILL for factor in factors[pairs:]):
        return {}
    # Half a number more, so that int() of its product with all numbers of a head is exact.
    return {"rope_type": "proportional", "partial_rotary_factor": (2 * pairs + 0.5) / (2 * len(factors))}


def llama3_parameters(factors: Sequence[float], theta: float) -> dict[str, Any]:
    """The llama3 rope parameters that give these frequency factors.

    The factors are 1 for fast dimensions, `factor` for slow ones, and in between 1 / ((1 - s) / factor + s), where
    s = (context / wavelength - 1) / 3; Llama 3.x uses 1 and 4 throughout, so one value in between gives the context.
    Llama 4 uses 1 and 1, so that there is none in between.
    """
    dims, factor = len(factors), max(factors)
    if all(abs(f - 1) < 1e-5 for f in factors):
        return {}
    contexts = {8192}
    for i, value in enumerate(factors):
        if 1.001 < value < factor * 0.999:
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            contexts.add(round((3 * smooth + 1) * 2 * math.pi * theta ** (i / dims)))
    for high, context in itertools.product((4.0, 1.0), sorted(contexts)):
        expected = [_llama3_factor(theta ** (-i / dims), factor, context, high) for i in range(dims)]
        if all(abs(a - b) <= 1e-4 * b for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedModelError("GGUF with rope_freqs other than Llama 3.x's scaling is not supported")


def _llama3_factor(frequency: float, factor: float, context: int, high: float) -> float:
    turns = context * frequency / (2 * math.pi)
    smooth = min(max((turns - 1.0) / (high - 1.0), 0.0), 1.0) if high > 1 else float(turns >= 1)
    return 1 / ((1 - smooth) / factor + smooth)
