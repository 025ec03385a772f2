"""GGUF metadata → a config with Hugging Face's field names, so that one family file serves both formats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import ModelSpec

_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
}
_FIELDS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
# Fields that would change results and that no family here reads.
_REFUSED = (
    "attention.alibi_bias_max",
    "attention.clamp_kqv",
    "attention.logit_softcapping",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "expert_shared_count",
    "expert_group_count",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.temperature_scale",
)
# Tokens after which llama.cpp ends a reply whatever the metadata names as end of sequence.
END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


def gguf_config(
    metadata: Mapping[str, Any], shape: Callable[[str], Sequence[int] | None], rope_factors: Sequence[float] | None
) -> dict[str, Any]:
    """The config of a GGUF file.

    shape: (rows, columns) or (length,) of the tensor of a name, None where the file has none
    rope_factors: the values of `rope_freqs.weight`, which divide the rotary frequencies (Llama 3.1)
    """
    name = metadata.get("general.architecture")
    if name not in _MODEL_TYPES:
        known = ", ".join(sorted(_MODEL_TYPES))
        raise UnsupportedModelError(f"GGUF architecture {name!r} is not supported; known: {known}")
    fields = {key.removeprefix(f"{name}."): value for key, value in metadata.items() if key.startswith(f"{name}.")}
    for key in _REFUSED:
        if fields.get(key):
            raise UnsupportedModelError(f"GGUF {name} with {key}={fields[key]!r} is not supported")
    config = {ours: fields[theirs] for ours, theirs in _FIELDS.items() if theirs in fields}
    config |= {
        "model_type": _MODEL_TYPES[name],
        "vocab_size": _rows(shape, "token_embd.weight"),
        "tie_word_embeddings": shape("output.weight") is None,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(metadata),
    }
    _check_heads(config, fields)
    config["rope_parameters"] = _rope(config, fields, rope_factors)
    if name == "llama" and fields.get("expert_count"):
        config |= {"model_type": "mixtral", "num_local_experts": fields["expert_count"]}
        config["num_experts_per_tok"] = fields.get("expert_used_count")
    if name == "qwen3moe":
        config |= _qwen3_moe(fields)
    if name == "gemma3":
        config |= _gemma3(config, fields)
    if name in ("llama", "mistral"):
        config["sliding_window"] = fields.get("attention.sliding_window")
    return config


def with_biases(spec: ModelSpec, has: Callable[[str], bool]) -> ModelSpec:
    """The spec with the attention biases that the file holds: GGUF says by their presence which there are."""
    layers = []
    for i, layer in enumerate(spec.layers):
        attention = layer.attention
        qkv = attention.qkv_bias or any(has(f"blk.{i}.attn_{name}.bias") for name in "qkv")
        out = attention.out_bias or has(f"blk.{i}.attn_output.bias")
        layers.append(replace(layer, attention=replace(attention, qkv_bias=qkv, out_bias=out)))
    return replace(spec, layers=tuple(layers))


def _rows(shape: Callable[[str], Sequence[int] | None], name: str) -> int:
    found = shape(name)
    if found is None or len(found) != 2:
        raise CheckpointError(f"the GGUF file has no matrix {name}")
    return found[0]


def _eos(metadata: Mapping[str, Any]) -> list[int]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    ids = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    found = [i for i in ids if i is not None]
    if isinstance(tokens, list) and isinstance(kinds, list) and len(kinds) == len(tokens):
        wanted = set(END_TOKENS)
        found += [i for i, kind in enumerate(kinds) if kind in (3, 4) and tokens[i] in wanted]
    return list(dict.fromkeys(found))


def _check_heads(config: dict[str, Any], fields: Mapping[str, Any]) -> None:
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = config.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            config[key] = value[0]
        elif isinstance(value, list):
            raise UnsupportedModelError(f"GGUF with a different {_FIELDS[key]} per layer is not supported")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        raise CheckpointError(f"GGUF metadata: head_count is {heads!r} and embedding_length {hidden!r}")
    head_dim = config.setdefault("head_dim", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.get(key, head_dim) != head_dim:
            raise UnsupportedModelError(f"GGUF with {key}={fields[key]!r} but head size {head_dim} is not supported")


def _rope(config: Mapping[str, Any], fields: Mapping[str, Any], factors: Sequence[float] | None) -> dict[str, Any]:
    theta = fields.get("rope.freq_base", 10000.0)
    kind = fields.get("rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise UnsupportedModelError(f"GGUF with rope_freqs and rope scaling {kind!r} is not supported")
        return {"rope_theta": theta, **llama3_parameters(factors, theta)}
    if kind == "none":
        # Files older than the scaling type say it with a scale alone.
        scale = fields.get("rope.scale_linear", 1.0)
        return {"rope_theta": theta} | ({"rope_type": "linear", "factor": scale} if scale not in (0, 1) else {})
    result = {"rope_theta": theta, "rope_type": kind, "factor": fields.get("rope.scaling.factor", 1.0)}
    if kind != "yarn":
        return result
    if (factor := fields.get("rope.scaling.yarn_ext_factor", 1.0)) != 1.0:
        raise UnsupportedModelError(f"GGUF with yarn_ext_factor={factor} is not supported")
    scale = fields.get("rope.scaling.attn_factor", 1.0)
    return result | {
        "original_max_position_embeddings": fields.get(
            "rope.scaling.original_context_length", config.get("max_position_embeddings")
        ),
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow", 1.0),
        "attention_factor": scale * (0.1 * math.log(result["factor"]) + 1.0) if result["factor"] > 1 else scale,
    }


def llama3_parameters(factors: Sequence[float], theta: float) -> dict[str, Any]:
    """The llama3 rope parameters that give these frequency factors.

    The factors are 1 for fast dimensions, `factor` for slow ones, and in between 1 / ((1 - s) / factor + s), where
    s = (context / wavelength - 1) / 3; Llama 3.x uses 1 and 4 throughout, so one value in between gives the context.
    """
    dims, factor = len(factors), max(factors)
    if all(abs(f - 1) < 1e-5 for f in factors):
        return {}
    contexts = {8192}
    for i, value in enumerate(factors):
        if 1.001 < value < factor * 0.999:
            smooth = (1 / value - 1 / factor) / (1 - 1 / factor)
            contexts.add(round((3 * smooth + 1) * 2 * math.pi * theta ** (i / dims)))
    for context in sorted(contexts):
        expected = [_llama3_factor(theta ** (-i / dims), factor, context) for i in range(dims)]
        if all(abs(a - b) <= 1e-4 * b for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedModelError("GGUF with rope_freqs other than Llama 3.x's scaling is not supported")


def _llama3_factor(frequency: float, factor: float, context: int) -> float:
    turns = context * frequency / (2 * math.pi)
    smooth = min(max((turns - 1.0) / 3.0, 0.0), 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _qwen3_moe(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_experts": fields.get("expert_count"),
        "num_experts_per_tok": fields.get("expert_used_count"),
        "moe_intermediate_size": fields.get("expert_feed_forward_length"),
        "norm_topk_prob": True,  # not in the file: llama.cpp always normalizes this architecture
    }


def _gemma3(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    layers, rope = config.get("num_hidden_layers"), config["rope_parameters"]
    if not isinstance(layers, int) or not 0 < layers <= 4096:
        raise CheckpointError(f"GGUF metadata: block_count is {layers!r}")
    pattern = fields.get("attention.sliding_window_pattern", 6)
    if not isinstance(pattern, list):
        pattern = [bool((i + 1) % max(int(pattern), 1)) for i in range(layers)]
    # llama.cpp knows the 27B model, which alone scales by hidden / heads, by its layers.
    is_27b = layers == 62
    return {
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in pattern],
        "sliding_window": fields.get("attention.sliding_window"),
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
        ),
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_theta": fields.get("rope.freq_base_swa", 10000.0)},
        },
    }
