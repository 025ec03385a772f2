"""GLM-4.5 and 4.6: rotary embedding of half a head, dense layers first, then mixtures with a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import GGUF_ROUTER_KEYS, MIXTURE, dense_first, sigmoid_experts, sigmoid_gguf
from flashrt.arch.names import GGUF_NAMES
from flashrt.spec import Layer, ModelSpec

# A layer behind the last predicts further tokens, and is not run.
NAMES = replace(MIXTURE, beyond="eh_proj.weight")
GGUF = replace(
    GGUF_NAMES,
    layer={**GGUF_NAMES.layer, "norm.ffn": ("post_attention_norm.weight",)},
    beyond="nextn.eh_proj.weight",
)
GGUF_KEYS = (*GGUF_ROUTER_KEYS, "nextn_predict_layers")


def spec(config: Config) -> ModelSpec:
    dim, bias, norm = config.head_dim(), config.flag("attention_bias"), config.flag("use_qk_norm")
    heads = attention(config, dim, config.partial_rope(dim, 0.5), qkv_bias=bias, qk_norm=norm)
    mixture = sigmoid_experts(Config({"norm_topk_prob": True, **config.data}, config.family))
    layers = [Layer(heads, ffn) for ffn in dense_first(config, mixture, 1)]
    return decoder_spec(config, layers, context=131072, norm_eps=config.number("rms_norm_eps", 1e-5))


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    beyond = fields.integer("nextn_predict_layers", 0)
    return sigmoid_gguf(config, fields) | {"num_hidden_layers": (config["num_hidden_layers"] or 0) - beyond}
