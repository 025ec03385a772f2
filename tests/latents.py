"""Tiny shapes of latent attention, and how llama.cpp's converter writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

FAMILIES = ("deepseek_v2", "deepseek_v2-lite", "deepseek_v3", "deepseek_v3-lite", "glm4_moe_lite")  # variants
SHAPE = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 14,  # even, as the view that transformers takes of DeepSeek V2 needs it
    "qk_rope_head_dim": 6,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-2,  # large, because norms of latents have another
}
LEAVES = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
}
SPLIT = ("deepseek_v3", "deepseek_v2-lite", "glm4_moe_lite")  # variants written as newer files have them: k_b and v_b


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    """Rope parameters."""
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {**rope, "mscale": mscale, "mscale_all_dim": mscale_all_dim}}


def split_tensors(layer: str, values: np.ndarray, config: Any) -> dict[str, np.ndarray]:
    """kv_b of a layer as newer files have it."""
    heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    keys, rest = heads[:, : config.qk_nope_head_dim], heads[:, config.qk_nope_head_dim :]
    own = {"attn_k_b": keys.swapaxes(1, 2), "attn_v_b": rest}
    return {f"blk.{layer}.{name}.weight": np.ascontiguousarray(part) for name, part in own.items()}


def expected_tensors(attention: Any, i: int) -> dict[str, torch.Tensor]:
    """Logical tensors of layer `i` as the module of a model holds them."""
    heads, nope, rank = attention.num_heads, attention.qk_nope_head_dim, attention.kv_lora_rank
    both = attention.kv_b_proj.weight.view(heads, -1, rank)
    result = {
        "kv_a": _halves(attention.kv_a_proj_with_mqa.weight, 1, rank),
        "kv_a_norm": attention.kv_a_layernorm.weight,
        "k_b": both[:, :nope].transpose(1, 2).flatten(0, 1),
        "v_b": both[:, nope:].flatten(0, 1),
        "out": attention.o_proj.weight,
    }
    if attention.q_lora_rank is None:
        result["queries"] = _halves(attention.q_proj.weight, heads, nope)
    else:
        result |= {"q_a": attention.q_a_proj.weight, "q_a_norm": attention.q_a_layernorm.weight}
        result["q_b"] = _halves(attention.q_b_proj.weight, heads, nope)
    return {f"{i}.{name}": values for name, values in result.items()}


def _halves(rows: torch.Tensor, heads: int, fixed: int) -> torch.Tensor:
    """Behind the first rows of each head, the even ones before the odd ones."""
    each = rows.unflatten(0, (heads, -1))
    return torch.cat([each[:, :fixed], each[:, fixed::2], each[:, fixed + 1 :: 2]], 1).flatten(0, 1)


def write_metadata(writer: Any, config: Any, split: bool) -> None:
    import gguf

    rotary, rank = config.qk_rope_head_dim, config.kv_lora_rank
    sizes = config.qk_nope_head_dim + rotary, config.v_head_dim
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(rank)
    writer.add_head_count_kv(1 if split else config.num_attention_heads)
    writer.add_key_length(rank + rotary if split else sizes[0])
    writer.add_value_length(rank if split else sizes[1])
    if split:
        writer.add_key_length_mla(sizes[0])
        writer.add_value_length_mla(sizes[1])
    writer.add_rope_dimension_count(rotary)
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if config.model_type != "deepseek_v2":  # whose files name no gating
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.norm_topk_prob)
    if config.n_group is not None:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    writer.add_leading_dense_block_count(getattr(config, "first_k_dense_replace", 1))
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
