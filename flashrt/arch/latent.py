"""What families of latent attention share: how their fields are read, and names of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.rope import yarn_attention
from flashrt.spec import LatentAttention

HF_LATENT = {
    "queries": "self_attn.q_proj.weight",
    "q_a": "self_attn.q_a_proj.weight",
    "q_a_norm": "self_attn.q_a_layernorm.weight",
    "q_b": "self_attn.q_b_proj.weight",
    "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "kv_b": "self_attn.kv_b_proj.weight",
}
GGUF_LATENT = {
    "queries": "attn_q.weight",
    "q_a": "attn_q_a.weight",
    "q_a_norm": "attn_q_a_norm.weight",
    "q_b": "attn_q_b.weight",
    "kv_a": "attn_kv_a_mqa.weight",
    "kv_a_norm": "attn_kv_a_norm.weight",
    "k_b": "attn_k_b.weight",
    "v_b": "attn_v_b.weight",
    "kv_b": "attn_kv_b.weight",
}
_MOST = 1 << 14  # numbers of a head
_MOST_MSCALE = 64
_YARN_LOG = 0.1  # llama.cpp's converter multiplies mscale_all_dim by it


def latent_attention(config: Config) -> LatentAttention:
    """The attention of every layer. YaRN's `mscale_all_dim` scales scores, as in DeepSeek's own code."""
    heads = config.integer("num_attention_heads", maximum=1 << 16)
    config.refuse("num_key_value_heads", heads)
    config.refuse("attention_bias", False)
    config.refuse("rope_interleave", True)
    rank, nope, rotary, values = (
        config.integer(key, maximum=_MOST)
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    if rotary % 2:
        raise UnsupportedModelError(f"{config.family} with qk_rope_head_dim={rotary} is not supported: it is odd")
    config.refuse("qk_head_dim", nope + rotary)
    config.refuse("head_dim", rotary, nope + rotary)
    rope, scale = config.rope(), (nope + rotary) ** -0.5
    parameters = Config(config.object("rope_scaling") or config.object("rope_parameters"), config.family)
    mscale = parameters.number("mscale_all_dim", 0.0)
    if not 0 <= mscale <= _MOST_MSCALE:
        raise CheckpointError(f"{config.family} config: mscale_all_dim is {mscale}, expected 0 to {_MOST_MSCALE}")
    if rope.kind != "default" and mscale:
        scale *= yarn_attention(rope.factor, mscale) ** 2
    return LatentAttention(
        heads,
        1,
        rank + rotary,
        scale,
        replace(rope, dims=rotary),
        rank=rank,
        nope_dim=nope,
        value_dim=values,
        query_rank=config.optional("q_lora_rank") or 0,
    )


def gguf_latent(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """Fields of latent attention, from files that hold kv_b and from those that hold k_b and v_b.

    The latter state sizes of keys as they are kept, and those of heads beside them. Raises CheckpointError.
    """
    rank, rotary = fields.integer("attention.kv_lora_rank"), fields.integer("rope.dimension_count")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    stated = fields.integer("attention.key_length"), fields.integer("attention.value_length")
    sizes = fields.integer("attention.key_length_mla"), fields.integer("attention.value_length_mla")
    if not rank or not rotary:
        raise CheckpointError(f"GGUF metadata: kv_lora_rank is {rank!r}, rope.dimension_count {rotary!r}")
    kept = any(sizes)
    expected = (1, rank + rotary, rank) if kept else (heads, *stated)
    if (kv_heads, *stated) != expected:
        found = f"head_count_kv, key_length and value_length are {kv_heads}, {stated[0]} and {stated[1]}"
        raise CheckpointError(f"GGUF metadata: {found}, expected {expected[0]}, {expected[1]} and {expected[2]}")
    key, value = sizes if kept else stated
    if not key or not value or key <= rotary:
        raise CheckpointError(f"GGUF metadata: heads of {key!r} and {value!r} numbers, {rotary} of them rotated")
    return {
        "num_key_value_heads": heads,
        "head_dim": None,
        "kv_lora_rank": rank,
        "q_lora_rank": fields.integer("attention.q_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
        "rope_parameters": _gguf_rope(config["rope_parameters"], fields),
        "attention_bias": False,  # what there is says the file itself
    }


def _gguf_rope(parameters: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """Of YaRN only mscale_all_dim is written: it is the mscale of cosines and sines too, which cancel then."""
    if parameters.get("rope_type") != "yarn":
        return dict(parameters)
    mscale = fields.number("rope.scaling.yarn_log_multiplier", 0.0) / _YARN_LOG
    if not mscale:
        raise UnsupportedModelError("GGUF deepseek2 with YaRN and no rope.scaling.yarn_log_multiplier is not supported")
    factor = parameters["attention_factor"] / yarn_attention(parameters["factor"])
    return {**parameters, "attention_factor": factor, "mscale_all_dim": mscale}
