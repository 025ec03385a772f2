"""Gemma 2: Gemma 3 without QK norm, attention scores and logits soft-capped, every other layer sliding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, layer_count, windows
from flashrt.arch.gemma3 import NAMES, embed_scale, query_scalar
from flashrt.arch.metadata import Metadata
from flashrt.spec import Ffn, Layer, ModelSpec

__all__ = ["GGUF_KEYS", "NAMES", "gguf", "spec"]

GGUF_KEYS = ("attn_logit_softcapping", "final_logit_softcapping")

# What transformers' Gemma2Config takes for what a config leaves out.
_DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def spec(config: Config) -> ModelSpec:
    stated = {key: value for key, value in config.data.items() if value is not None or key.endswith("softcapping")}
    text = Config({**_DEFAULTS, **stated}, "gemma2")
    text.refuse("use_bidirectional_attention", False)
    bias, scalar = text.flag("attention_bias"), text.positive("query_pre_attn_scalar", 256)
    heads = attention(text, text.head_dim(256), text.rope(), scale=scalar**-0.5, qkv_bias=bias, out_bias=bias)
    heads = replace(heads, softcap=text.cap("attn_logit_softcapping"))
    ffn = Ffn(text.integer("intermediate_size"), text.activation("hidden_activation", "gelu_pytorch_tanh"))
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layer_count(text))]
    layers = [
        Layer(replace(heads, window=window), ffn) for window in windows(text, text.integer("sliding_window"), types)
    ]
    options = {"embed_scale": embed_scale(text), "logit_softcap": text.cap("final_logit_softcapping")}
    return decoder_spec(text, layers, post_norms=True, tied=True, **options)


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": query_scalar(config, 46),
        "sliding_window": fields.integer("attention.sliding_window", 4096),
        "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
    }
