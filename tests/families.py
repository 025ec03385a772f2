"""Tiny random models of every family, saved as transformers saves them, and as GGUF: what parity tests compare with.

Shapes are odd on purpose (nothing a power of two where the family allows it), biases and norms are random, windows are
shorter than a test prompt. transformers is imported late: most tests of a parametrisation never need it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import hybrids, latents

VOCAB = 131
BOS, EOS, USER = 0, 1, 2
FATRELU_THRESHOLD = 0.4  # large enough to show: a third of the positive gates lie below
SPECIAL = ("<s>", "</s>", "<|user|>")
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}{{ eos_token }}{% endfor %}"

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_COMMON = {**SHAPE, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None, "tie_word_embeddings": False}
_LLAMA = {**_COMMON, "head_dim": 20, "rms_norm_eps": 1e-5}


def _two_ropes(full: float, sliding: float) -> dict[str, Any]:
    """Scaled in layers that see everything, plain in those that see a window."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": full}
    plain = {"rope_type": "default", "rope_theta": sliding}
    return {"rope_parameters": {"full_attention": rope, "sliding_attention": plain}}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **fields}}


_SIGMOID_ROUTER = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}

_SOFTMAX_ROUTER = {**_SIGMOID_ROUTER, "norm_topk_prob": False}
_GEMMA4 = {
    **_COMMON,
    "num_hidden_layers": 5,
    "head_dim": 20,
    "global_head_dim": 36,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 10.5 / 36, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    },
}

# Variant → (config class, model class, config fields).
_VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "llama-bias": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear": ("LlamaConfig", "LlamaForCausalLM", _LLAMA | _rope("linear", factor=3.0)),
    "llama-llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _LLAMA
        | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": (
        "LlamaConfig",
        "LlamaForCausalLM",
        _LLAMA | _rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-relu": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "hidden_act": "relu"}),
    "llama-relu2": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "hidden_act": "relu2"}),
    "llama-fatrelu": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_LLAMA, "hidden_act": "fatrelu", "hidden_act_param": FATRELU_THRESHOLD},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _COMMON),
    "qwen2-window": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            **_COMMON,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_COMMON, "head_dim": 20}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "query_pre_attn_scalar": 15,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
            "tie_word_embeddings": True,
        }
        | _two_ropes(5000.0, 300.0),
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_COMMON,
            "num_key_value_heads": 3,
            "head_dim": 20,
            "query_pre_attn_scalar": 15,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.5,
            "final_logit_softcapping": 3.5,
            "tie_word_embeddings": True,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "num_key_value_heads": 3,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "final_logit_softcapping": 3.5,
        },
    ),
    "gemma4_unified": (
        "Gemma4UnifiedTextConfig",
        "Gemma4UnifiedForCausalLM",
        {
            **{key: value for key, value in _GEMMA4.items() if key != "hidden_size_per_layer_input"},
            "num_kv_shared_layers": 2,
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
        },
    ),
    "gemma4-inputs": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "num_hidden_layers": 7,
            "rms_norm_eps": 1e-5,
            "hidden_size_per_layer_input": 12,
            "vocab_size_per_layer_input": VOCAB,
            "layer_types": [
                *("sliding_attention", "full_attention", "full_attention", "sliding_attention"),
                *("full_attention", "sliding_attention", "full_attention"),
            ],
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4-experts": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "num_key_value_heads": 3,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "num_experts": 7,
            "top_k_experts": 3,
            "moe_intermediate_size": 24,
        },
    ),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**_COMMON, "hidden_size": 84} | _rope("default", partial_rotary_factor=0.72),
    ),
    "phi3-longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **_COMMON,
            "sliding_window": 9,
            "original_max_position_embeddings": 100,  # beyond what tests plan for: transformers changes at this length
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 1.0,
                "short_factor": [1.0 + 0.3 * i for i in range(6)],
                "long_factor": [1.2 + 0.9 * i for i in range(6)],
            },
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**_COMMON, "attention_bias": True}),
    "olmo3": (
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            **_COMMON,
            "num_hidden_layers": 5,
            "sliding_window": 6,
        }
        | _two_ropes(1000.0, 1000.0),
    ),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            **_COMMON,
            "embedding_multiplier": 3.5,
            "residual_multiplier": 0.37,
            "attention_multiplier": 0.21,
            "logits_scaling": 1.9,
        },
    ),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {**_COMMON, "num_hidden_layers": 5, "tie_word_embeddings": True} | _rope("default"),
    ),
    "smollm3-window": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {**_COMMON, "use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 1]},
    ),
    "glm4": (
        "Glm4Config",
        "Glm4ForCausalLM",
        {**_COMMON, "head_dim": 20} | _rope("default", partial_rotary_factor=0.6),
    ),
    "ministral": (
        "MinistralConfig",
        "MinistralForCausalLM",
        {**_LLAMA, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "ministral3": (
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            **_LLAMA,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 11,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.7,
            },
        },
    ),
    "cohere": (
        "CohereConfig",
        "CohereForCausalLM",
        {**_COMMON, "logit_scale": 0.3, "tie_word_embeddings": True} | _rope("default"),
    ),
    "cohere2": (
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {**_COMMON, "num_hidden_layers": 5, "logit_scale": 0.3, "sliding_window": 6, "tie_word_embeddings": True}
        | _rope("default"),
    ),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM", {**_COMMON, "head_dim": 20}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 72,
            "ffn_dim": 104,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "max_position_embeddings": 256,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": 3,
            "word_embed_proj_dim": 72,
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_LLAMA, "intermediate_size": 40, "num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**_COMMON, **hybrids.SHAPE}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**_COMMON, **hybrids.SHAPE, **hybrids.MIXTURE, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**_COMMON, **hybrids.SHAPE, **hybrids.MIXTURE},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_COMMON,
            "head_dim": 20,
            "moe_intermediate_size": 24,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_COMMON,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 56,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {**_COMMON, "intermediate_size": 40, "num_experts": 7, "num_experts_per_tok": 3},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {
            **_COMMON,
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.5,
            "residual_multiplier": 0.37,
            "attention_multiplier": 0.21,
            "logits_scaling": 1.9,
        },
    ),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        {
            **_COMMON,
            "intermediate_size": 40,
            "shared_intermediate_size": 56,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": True,
        },
    ),
    "dots1": (
        "Dots1Config",
        "Dots1ForCausalLM",
        {
            **_COMMON,
            **_SIGMOID_ROUTER,
            "head_dim": 20,
            "sliding_window": 6,
            "max_window_layers": 1,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {
            **_COMMON,
            **latents.SHAPE,
            **_SOFTMAX_ROUTER,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        }
        | latents.yarn(0.9, 0.6),
    ),
    "deepseek_v2-lite": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_COMMON, **latents.SHAPE, **_SOFTMAX_ROUTER, "q_lora_rank": None, "topk_method": "greedy"}
        | _rope("default"),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**_COMMON, **_SIGMOID_ROUTER, **latents.SHAPE, "n_group": 4, "topk_group": 2, "num_mtp_layers": 0}
        | latents.yarn(0.7, 0.7),
    ),
    "deepseek_v3-lite": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_COMMON,
            **_SIGMOID_ROUTER,
            **latents.SHAPE,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "num_mtp_layers": 0,
        }
        | _rope("default"),
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        {
            **_COMMON,
            **_SIGMOID_ROUTER,
            **latents.SHAPE,
            "v_head_dim": 24,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        }
        | _rope("default"),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            **_COMMON,
            **_SIGMOID_ROUTER,
            "head_dim": 20,
            "attention_bias": True,
            "use_qk_norm": True,
            "num_nextn_predict_layers": 1,
        }
        | _rope("default", partial_rotary_factor=0.6),
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "intermediate_size": 24,
            "intermediate_size_mlp": 104,
            "head_dim": 20,
            "num_local_experts": 5,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 512,
            "floor_scale": 11,
            "attn_scale": 0.7,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "intermediate_size": 40,
            "head_dim": 20,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 1.3,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            **_COMMON,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 24,
            "moe_num_experts": 7,
            "moe_k": 3,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 2,
            "tie_word_embeddings": True,
        },
    ),
}

FAMILIES = tuple(_VARIANTS)
GGUF_FAMILIES = (
    "llama",
    "llama-bias",
    "llama-llama3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "qwen3_next",
    "qwen3_5_moe_text",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4-inputs",
    "gemma4-experts",
    "mixtral",
    "qwen3_moe",
    "phi3",
    "phi3-longrope",
    "olmo2",
    "olmo3",
    "granite",
    "smollm3",
    "glm4",
    "seed_oss",
    "ministral3",
    "cohere",
    "cohere2",
    "qwen2_moe",
    "olmoe",
    "granitemoe",
    "granitemoeshared",
    "dots1",
    "glm4_moe",
    *latents.FAMILIES,
    "ernie4_5_moe",
    "gpt_oss",
    "llama4",
)
# Fields that GGUF does not hold, as llama.cpp takes them.
GGUF_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": latents.yarn(0.6, 0.6),
    "gemma2": {"query_pre_attn_scalar": 20},
    "gemma3": {"query_pre_attn_scalar": 20},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_5_text": hybrids.GGUF_FIELDS,
    "qwen3_5_moe_text": hybrids.GGUF_FIELDS,
    "qwen3_next": {"mlp_only_layers": [], **hybrids.GGUF_FIELDS},
    "qwen2_moe": {"mlp_only_layers": []},
    "gpt_oss": {"swiglu_limit": 7.0},
    "llama4": {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
    "dots1": {"sliding_window": None, "layer_types": ["full_attention"] * 3},
}


def tiny_model(family: str, seed: int = 0, config: Any = None, **overrides: Any) -> Any:
    """A random transformers model of a variant, float32, in evaluation mode.

    `overrides` are config fields; `config` is a configuration to build instead of the variant's own.
    """
    import transformers

    # ProSparse checkpoints (arXiv:2402.13516) bring code of their own for this activation.
    transformers.activations.ACT2FN["fatrelu"] = (torch.nn.Threshold, {"threshold": FATRELU_THRESHOLD, "value": 0.0})
    config_class, model_class, fields = _VARIANTS[family]
    config = config or getattr(transformers, config_class)(**{**fields, **overrides})
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, model_class)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter, generator)
        for buffer in stored_buffers(model):
            buffer.mul_(1 + torch.randn(buffer.shape, generator=generator) * 0.3)
    return model


def _randomise(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if "correction" in name:
        parameter.copy_(noise * 0.1)
    elif name.endswith(("sinks", "_bias")):
        parameter.copy_(noise)
    elif parameter.ndim > 1:
        # Unit gain, so that activations neither vanish nor explode and every weight shows in the logits.
        scale = 0.5 if "embed" in name else parameter.shape[-1] ** -0.5
        parameter.copy_(noise * scale)
    elif name.endswith("A_log"):
        parameter.copy_(noise - 2)  # states are kept for some tokens
    elif name.endswith("bias"):
        parameter.copy_(noise * 0.3)
    else:
        parameter.copy_(parameter + noise * 0.2)  # norms: around one, or around zero for Gemma


def tiny_checkpoint(
    family: str, directory: Path | str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[Any, Path]:
    """Save a tiny model of `family` (one of FAMILIES) with a tokenizer. Returns (model, directory).

    The model is float32 whatever `dtype` is saved: its weights are the saved ones exactly.
    """
    directory = Path(directory)
    model = tiny_model(family, seed, **overrides)
    # A copy, because `.to` would round the rotary frequencies too, which no checkpoint holds.
    copy.deepcopy(model).to(dtype).save_pretrained(directory)
    write_tokenizer(directory)
    with torch.no_grad():
        for values in (*model.parameters(), *stored_buffers(model)):
            values.copy_(values.to(dtype))
    if family.startswith(("gemma2", "gemma3", "gemma4")):
        # transformers rounds the scale to the type of the weights; the float32 model has to follow the saved one.
        for embed in (model.model.embed_tokens, getattr(model.model, "embed_tokens_per_layer", None)):
            if embed is not None:
                embed.embed_scale.copy_(torch.tensor(embed.scalar_embed_scale).to(dtype).float())
    return model, directory


def stored_buffers(model: Any) -> list[torch.Tensor]:
    """Weights of a model that are no parameters."""
    return [buffer for name, buffer in model.named_buffers() if name.endswith(("correction_bias", "layer_scalar"))]


def tiny_tokens() -> tuple[list[str], list[tuple[str, str]]]:
    """(tokens, merges) of a byte-level BPE over printable ASCII, as large as the tiny models' vocabulary."""
    letters = [chr(c) for c in range(33, 127)] + ["\u0120", "\u010a"]  # the byte alphabet's space and newline
    merges = []
    for pair in ("t h", "th e", "\u0120 the", "i n", "in g", "a n", "an d", "\u0120 a", "e r", "o n", "\u0120 and"):
        left, right = pair.split(" ")
        merges.append((left, right))
    tokens = [*SPECIAL, "<pad>", *letters, *(left + right for left, right in merges)]
    return tokens + [f"<unused{i}>" for i in range(VOCAB - len(tokens))], merges


def tokenizer_json() -> bytes:
    tokens, merges = tiny_tokens()
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    start = {"SpecialToken": {"id": SPECIAL[BOS], "type_id": 0}}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIAL[BOS]: {"id": SPECIAL[BOS], "ids": [BOS], "tokens": [SPECIAL[BOS]]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    return json.dumps(document).encode()


def write_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_bytes(tokenizer_json())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


_GGUF_ARCH = {
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "ministral3": "mistral3",
    "olmo3": "olmo2",
    "qwen3_5_text": "qwen35",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe_text": "qwen35moe",
    "cohere": "command-r",
    "qwen2_moe": "qwen2moe",
    "granitemoeshared": "granitemoe",
    "glm4_moe": "glm4moe",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "deepseek2"),
    "gpt_oss": "gpt-oss",
    "ernie4_5_moe": "ernie4_5-moe",
}  # where it is not the family's name
HYBRIDS = {
    "qwen3_5_text": True,
    "qwen3_5_moe_text": True,
    "qwen3_next": False,
}  # and whether heads of values are tiled in GGUF
_PERMUTED = ("llama", "mixtral", "granite", "granitemoe", "granitemoeshared", "smollm3", "ministral3")
_SHARED = ("shared_expert", "shared_experts")
_GGUF_LEAVES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    **latents.LEAVES,
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps.weight",
    "shared_mlp.output_linear": "ffn_down_shexp",
    **{f"mlp.{name}.{part}_proj": f"ffn_{part}_shexp" for name in _SHARED for part in ("gate", "up", "down")},
}
_SANDWICH = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
_GEMMA4_LEAVES = {
    **_SANDWICH,
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
_OTHER_LEAVES = {
    "gemma2": _SANDWICH,
    "gemma3": _SANDWICH,
    "gemma4": _GEMMA4_LEAVES,
    "gemma4-inputs": _GEMMA4_LEAVES,
    "gemma4-experts": {
        "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
        "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
        "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.gate_up_proj": "ffn_gate_up_exps.weight",
        "experts.down_proj": "ffn_down_exps.weight",
        **_GEMMA4_LEAVES,
    },
    "olmo2": _SANDWICH,
    "olmo3": _SANDWICH,
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), hybrids.LEAVES),
    "seed_oss": {"post_attention_layernorm.weight": "post_attention_norm.weight"},
    "glm4": {
        "post_self_attn_layernorm.weight": "post_attention_norm.weight",
        "post_mlp_layernorm.weight": "post_ffw_norm.weight",
    },
    "glm4_moe": {"post_attention_layernorm.weight": "post_attention_norm.weight"},
    "gpt_oss": {
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router": "ffn_gate_inp",
        "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    },
    "llama4": {
        "feed_forward.router": "ffn_gate_inp",
        **{f"feed_forward.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
        **{f"feed_forward.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    },
}


def tiny_gguf(
    family: str,
    path: Path | str,
    seed: int = 0,
    quant: str = "F32",
    *,
    change: Callable[[Any], None] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
    encode: Callable[[str, np.ndarray], tuple[np.ndarray, Any] | None] | None = None,
    **overrides: Any,
) -> tuple[Any, Path]:
    """Write the same weights as `tiny_checkpoint(family, seed=seed)` as GGUF. Returns (model, path).

    family: one of GGUF_FAMILIES; quant: type of the matrices whose rows it fits (F32, F16, BF16, Q8_0)
    change: called with the model before it is written; extra: further tensors of the file
    metadata: keys of the file in place of what the model's would be
    encode: bytes of a tensor and their type, instead; None for one that it leaves alone
    """
    import gguf

    path = Path(path)
    model = tiny_model(family, seed, **overrides)
    if change is not None:
        change(model)
    config = model.config
    config.allow_global_per_layer_attribute_access = True  # of Gemma 4's: what layers have in common
    base = family.partition("-")[0]
    arch = _GGUF_ARCH.get(base, base)
    writer = gguf.GGUFWriter(path, arch)
    _write_metadata(writer, config, family, arch)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in {**_gguf_tensors(model, family), **(extra or {})}.items():
        kind = gguf.GGMLQuantizationType[quant]
        encoded = None if encode is None else encode(name, values)
        if encoded is not None:
            writer.add_tensor(name, encoded[0], raw_dtype=encoded[1])
        elif values.ndim > 1 and quant != "F32" and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def _write_metadata(writer: Any, config: Any, family: str, arch: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers + getattr(config, "num_nextn_predict_layers", 0))
    writer.add_feed_forward_length(getattr(config, "intermediate_size_mlp", config.intermediate_size))
    writer.add_head_count(config.num_attention_heads)
    if arch != "deepseek2":
        writer.add_head_count_kv(config.num_key_value_heads)
    if arch not in ("command-r", "cohere2"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) if arch not in ("cohere2", "deepseek2") else None
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("gemma3", "olmo3"):
        _write_gemma_metadata(writer, config)
    elif arch not in ("gemma2", "gemma4"):
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "deepseek2":
        latents.write_metadata(writer, config, family in latents.SPLIT)
    if arch in _METADATA:
        _METADATA[arch](writer, config)
    if family == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family in _EXPERT_COUNTS:
        writer.add_expert_count(getattr(config, _EXPERT_COUNTS[family]))
        writer.add_expert_used_count(config.num_experts_per_tok)
        if hasattr(config, "moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    tokens, merges = tiny_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 5 if token.startswith("<unused") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _write_gemma_metadata(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_array(
        f"{writer.arch}.attention.sliding_window_pattern", [kind == "sliding_attention" for kind in config.layer_types]
    )
    full, sliding = config.rope_parameters["full_attention"], config.rope_parameters["sliding_attention"]
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_float32(f"{writer.arch}.rope.freq_base_swa", sliding["rope_theta"])
    if full["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_float32(f"{writer.arch}.rope.scaling.factor", full["factor"])


def _write_gemma2_metadata(writer: Any, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _write_gemma4_metadata(writer: Any, config: Any) -> None:
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    full = config.per_layer_config["full_attention"]
    for name in ("attention.key_length", "attention.value_length", "attention.head_count_kv", "feed_forward_length"):
        writer.kv_data[0].pop(f"gemma4.{name}", None)
    double = [config.use_double_wide_mlp and mode == "reuse" for mode in config.kv_sharing_modes]
    writer.add_feed_forward_length([config.intermediate_size * (2 if own else 1) for own in double])
    writer.add_head_count_kv([own.num_key_value_heads for own in config.per_layer_config])
    writer.add_key_length(full.head_dim)
    writer.add_value_length(full.head_dim)
    writer.add_key_length_swa(config.head_dim)
    writer.add_value_length_swa(config.head_dim)
    writer.add_rope_dimension_count(full.head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    if config.enable_moe_block:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k_experts)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_phi3_metadata(writer: Any, config: Any) -> None:
    rope, head = config.rope_parameters, config.hidden_size // config.num_attention_heads
    original = config.original_max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_type(gguf_type("LONGROPE"))
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def _write_granite_metadata(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _write_hybrid_mixture_metadata(writer: Any, config: Any) -> None:
    hybrids.write_metadata(writer, config)
    _write_qwen2_moe_metadata(writer, config)


def _write_qwen2_moe_metadata(writer: Any, config: Any) -> None:
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _write_granitemoe_metadata(writer: Any, config: Any) -> None:
    _write_granite_metadata(writer, config)
    if shared := getattr(config, "shared_intermediate_size", 0):
        writer.add_expert_shared_feed_forward_length(shared)


def _write_sigmoid_metadata(writer: Any, config: Any) -> None:
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)


def _write_glm4_moe_metadata(writer: Any, config: Any) -> None:
    import gguf

    _write_sigmoid_metadata(writer, config)
    _write_glm4_metadata(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_nextn_predict_layers(config.num_nextn_predict_layers)


def _write_ernie_metadata(writer: Any, config: Any) -> None:
    writer.add_interleave_moe_layer_step(config.moe_layer_interval)
    writer.add_leading_dense_block_count(config.moe_layer_start_index)
    writer.add_expert_shared_count(config.moe_num_shared_experts)
    writer.add_expert_shared_feed_forward_length(config.moe_num_shared_experts * config.moe_intermediate_size)


def _write_glm4_metadata(writer: Any, config: Any) -> None:
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))


def _write_llama4_metadata(writer: Any, config: Any) -> None:
    writer.add_interleave_moe_layer_step(config.interleave_moe_layer_step)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _write_gpt_oss_metadata(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_rope_scaling_type(gguf_type("YARN"))
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_ministral3_metadata(writer: Any, config: Any) -> None:
    rope = config.rope_parameters
    writer.add_rope_scaling_type(gguf_type("YARN"))
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _write_cohere_metadata(writer: Any, config: Any) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_logit_scale(config.logit_scale)
    writer.add_rope_scaling_type(gguf_type("NONE"))
    if hasattr(config, "sliding_window"):
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def gguf_type(name: str) -> Any:
    import gguf

    return gguf.RopeScalingType[name]


_METADATA: dict[str, Callable[[Any, Any], None]] = {
    "gemma2": _write_gemma2_metadata,
    "gemma4": _write_gemma4_metadata,
    "phi3": _write_phi3_metadata,
    "granite": _write_granite_metadata,
    "glm4": _write_glm4_metadata,
    "qwen2moe": _write_qwen2_moe_metadata,
    "granitemoe": _write_granitemoe_metadata,
    "dots1": _write_sigmoid_metadata,
    "glm4moe": _write_glm4_moe_metadata,
    "ernie4_5-moe": _write_ernie_metadata,
    "gpt-oss": _write_gpt_oss_metadata,
    "llama4": _write_llama4_metadata,
    "mistral3": _write_ministral3_metadata,
    "command-r": _write_cohere_metadata,
    "cohere2": _write_cohere_metadata,
    "qwen35": hybrids.write_metadata,
    "qwen35moe": _write_hybrid_mixture_metadata,
    "qwen3next": _write_hybrid_mixture_metadata,
}


_EXPERT_COUNTS = {  # variant → the field of its config
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "qwen3_next": "num_experts",
    "qwen3_5_moe_text": "num_experts",
    "olmoe": "num_experts",
    "granitemoe": "num_local_experts",
    "granitemoeshared": "num_local_experts",
    "dots1": "n_routed_experts",
    **dict.fromkeys(latents.FAMILIES, "n_routed_experts"),
    "glm4_moe": "n_routed_experts",
    "ernie4_5_moe": "moe_num_experts",
    "gpt_oss": "num_local_experts",
    "llama4": "num_local_experts",
}


def _gguf_tensors(model: Any, family: str) -> dict[str, np.ndarray]:
    config, result = model.config, {}
    leaves = _GGUF_LEAVES | _OTHER_LEAVES.get(family, {})
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        values = values.squeeze(0) if len(values) == 1 < values.ndim else values  # as the converter does
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                result["output.weight"] = values
        elif family == "gpt_oss" and "experts." in name:
            result |= _gpt_oss_experts(name, values)
        elif family == "llama4" and "experts." in name:
            result |= _llama4_experts(name, values)
        elif name.endswith("experts.gate_up_proj") and not family.startswith("gemma4"):
            layer, half = name.split(".")[2], values.shape[1] // 2
            result[f"blk.{layer}.ffn_gate_exps.weight"] = np.ascontiguousarray(values[:, :half])
            result[f"blk.{layer}.ffn_up_exps.weight"] = np.ascontiguousarray(values[:, half:])
        elif name.endswith("kv_b_proj.weight") and family in latents.SPLIT:
            result |= latents.split_tensors(name.split(".")[2], values, config)
        elif name.endswith("in_proj_qkvz.weight"):
            layer, (qkv, gate) = name.split(".")[2], hybrids.split_projection(values, config)
            result |= {f"blk.{layer}.attn_qkv.weight": qkv, f"blk.{layer}.attn_gate.weight": gate}
        elif name.endswith("shared_mlp.input_linear.weight"):
            layer, half = name.split(".")[2], len(values) // 2
            result[f"blk.{layer}.ffn_gate_shexp.weight"] = values[:half]
            result[f"blk.{layer}.ffn_up_shexp.weight"] = values[half:]
        else:
            result[_gguf_name(name, leaves)] = _gguf_values(name, values, config, family)
    if family == "phi3-longrope":
        for kind in ("short", "long"):
            factors = config.rope_parameters[f"{kind}_factor"]
            result[f"rope_factors_{kind}.weight"] = np.asarray(factors, np.float32)
    if family.startswith("gemma4"):
        still = model.model.rotary_emb.full_attention_inv_freq.numpy() == 0
        result["rope_freqs.weight"] = np.where(still, 1e30, 1).astype(np.float32)
    if family == "llama-llama3":
        result["rope_freqs.weight"] = _rope_factors(model)
    return result


def _gpt_oss_experts(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    _, _, layer, leaf = name.split(".", 3)
    kind = "bias" if leaf.endswith("_bias") else "weight"
    rows = values if kind == "bias" else np.ascontiguousarray(values.swapaxes(1, 2))
    if "down" in leaf:
        return {f"blk.{layer}.ffn_down_exps.{kind}": rows}
    parts = {"gate": rows[:, 0::2], "up": rows[:, 1::2]}
    return {f"blk.{layer}.ffn_{part}_exps.{kind}": np.ascontiguousarray(own) for part, own in parts.items()}


def _llama4_experts(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    _, _, layer, leaf = name.split(".", 3)
    rows = np.ascontiguousarray(values.swapaxes(1, 2))
    if "down" in leaf:
        return {f"blk.{layer}.ffn_down_exps.weight": rows}
    half = rows.shape[1] // 2
    return {
        f"blk.{layer}.ffn_gate_exps.weight": rows[:, :half].copy(),
        f"blk.{layer}.ffn_up_exps.weight": rows[:, half:].copy(),
    }


_GGUF_SHARED = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}


def _gguf_name(name: str, leaves: dict[str, str]) -> str:
    if name in _GGUF_SHARED:
        return _GGUF_SHARED[name]
    _, _, layer, leaf = name.split(".", 3)
    for ours, theirs in leaves.items():
        if leaf.startswith(ours):
            return f"blk.{layer}.{theirs}{leaf[len(ours) :]}"
    raise KeyError(name)


def _gguf_values(name: str, values: np.ndarray, config: Any, family: str) -> np.ndarray:
    """What llama.cpp's converter changes: Gemma's norms hold 1 + w, Llama's query and key rows are permuted."""
    if family in ("gemma2", "gemma3") and "norm" in name:
        return values + 1
    if family in HYBRIDS:
        return hybrids.gguf_values(name, values, config, HYBRIDS[family])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    kind = name.split(".")[-2]
    if family.partition("-")[0] in _PERMUTED and kind in heads:
        count = heads[kind]
        paired = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(values.shape))
    return values


def _rope_factors(model: Any) -> np.ndarray:
    """Plain frequencies over scaled ones."""
    scaled = model.model.rotary_emb.inv_freq.double().numpy()
    theta = model.config.rope_parameters["rope_theta"]
    plain = theta ** (-np.arange(len(scaled)) / len(scaled))
    return (plain / scaled).astype(np.float32)
