"""Models that see or hear around one that reads: the text model inside, which is all that is run.

The text model of each of them computes what the family of its own name computes, as long as there is only text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.arch.config import without_sections
from flashrt.errors import CheckpointError, UnsupportedModelError

_TIED_UNLESS_SAID = ("gemma4", "gemma4_unified", "internvl", "mistral3")
WRAPPERS = (
    "gemma4",
    "gemma4_unified",
    "idefics3",
    "internvl",
    "llama4",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "smolvlm",
    "video_llava",
    "vipllava",
)
"""model_type of configurations that hold a `text_config`."""

_TEXT_FAMILIES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_TEXT_OF = {
    kind: f"{kind}_text"
    for kind in ("gemma4", "gemma4_unified", "llama4", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")
}
# What published text_configs leave out: the defaults of transformers' configuration classes.
_QWEN = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32}
_QWEN_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "intermediate_size": 11008, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {**_QWEN, "num_attention_heads": 32, "num_key_value_heads": 32},
    "qwen3": {**_QWEN, "num_attention_heads": 32, "num_key_value_heads": 32},
    "qwen2_vl_text": _QWEN_VL,
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen3_vl_text": {
        **_QWEN,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_theta": 5e5,
        "max_position_embeddings": 128000,
    },
}
_DEFAULTS["qwen3_5_text"] = {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
_DEFAULTS["qwen3_5_moe_text"] = {
    "vocab_size": 248320,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "num_experts_per_tok": 8,
}
_INHERITED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text model inside `config`, or `config` itself where it wraps none.

    Raises UnsupportedModelError for what holds a text_config and is not known to compute as its text model alone.
    """
    kind = config.get("model_type")
    if kind not in WRAPPERS:
        if isinstance(config.get("text_config"), Mapping) and kind != "gemma3":
            known = ", ".join(WRAPPERS)
            raise UnsupportedModelError(f"architecture {kind!r} around a text model is not supported; known: {known}")
        return config
    inner = config.get("text_config")
    if inner is None:
        inner = {key: value for key, value in config.items() if key != "vision_config"}  # as Qwen2-VL wrote it first
        inner["model_type"] = _TEXT_OF.get(str(kind), "llama")
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"{kind} config: text_config is {inner!r:.80}, expected an object")
    text = inner.get("model_type") or _TEXT_OF.get(str(kind), "llama")
    inherited = {key: config[key] for key in _INHERITED if config.get(key) is not None}
    result = {**_DEFAULTS.get(str(text), {}), **inherited, **{k: v for k, v in inner.items() if v is not None}}
    if "sliding_window" in inner:
        result["sliding_window"] = inner["sliding_window"]  # null says that there is none
    tied = config.get("tie_word_embeddings", kind in _TIED_UNLESS_SAID)
    result |= {
        "model_type": _TEXT_FAMILIES.get(str(text), text),
        "tie_word_embeddings": tied or inner.get("tie_word_embeddings") or False,
    }
    return without_sections(result) if text in _TEXT_FAMILIES else result
