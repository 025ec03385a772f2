"""GLM-4.5 and 4.6: rotary embedding of half a head, dense layers first, then mixtures with a shared expert.

GLM-4.7-Flash is the same mixture over latent attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import attention, decoder_spec, gated_ffn, layer_count
from flashrt.arch.latent import HF_LATENT, latent_attention
from flashrt.arch.metadata import Metadata
from flashrt.arch.mixture import GGUF_ROUTER_KEYS, MIXTURE, dense_first, sigmoid_experts, sigmoid_gguf
from flashrt.arch.names import GGUF_AHEAD, GGUF_NAMES, HF_AHEAD
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import Layer, ModelSpec

NAMES = replace(MIXTURE, ahead=HF_AHEAD)
LITE_NAMES = replace(NAMES, latent=HF_LATENT, permuted=True)
GGUF = replace(
    GGUF_NAMES,
    layer={**GGUF_NAMES.layer, "norm.ffn": ("post_attention_norm.weight",)},
    ahead=GGUF_AHEAD,
)
GGUF_KEYS = (*GGUF_ROUTER_KEYS, "nextn_predict_layers")
_LITE = {  # what transformers' configuration takes where a field is absent
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
}


def spec(config: Config) -> ModelSpec:
    dim, bias, norm = config.head_dim(), config.flag("attention_bias"), config.flag("use_qk_norm")
    heads = attention(config, dim, config.partial_rope(dim, 0.5), qkv_bias=bias, qk_norm=norm)
    mixture = sigmoid_experts(Config({"norm_topk_prob": True, **config.data}, config.family))
    layers = [Layer(heads, ffn) for ffn in dense_first(config, mixture, 1)]
    return decoder_spec(config, layers, context=131072, norm_eps=config.number("rms_norm_eps", 1e-5))


def lite_spec(config: Config) -> ModelSpec:
    config = Config({**_LITE, **config.data}, config.family)
    heads, mixture = latent_attention(config), sigmoid_experts(config)
    layers = [Layer(heads, mixture if sparse else gated_ffn(config)) for sparse in _mixtures(config)]
    return decoder_spec(config, layers, context=202752, norm_eps=config.number("rms_norm_eps", 1e-5))


def _mixtures(config: Config) -> list[bool]:
    """Whether each layer is a mixture: by `mlp_layer_types`, or all but the first."""
    count, dense = layer_count(config), config.integer("first_k_dense_replace", 1, minimum=0)
    first = [i >= dense for i in range(count)]
    types = config.names("mlp_layer_types", count)
    if types is None:
        if dense != 1:
            raise UnsupportedModelError(f"{config.family} with first_k_dense_replace={dense} is not supported")
        return first
    if not set(types) <= {"dense", "sparse"}:
        raise UnsupportedModelError(f"{config.family} with mlp_layer_types={types!r:.80} is not supported")
    found = [name == "sparse" for name in types]
    if "first_k_dense_replace" in config.data and found != first:
        raise CheckpointError(f"{config.family} config: mlp_layer_types are not those of first_k_dense_replace={dense}")
    return found


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    beyond = fields.integer("nextn_predict_layers", 0)
    return sigmoid_gguf(config, fields) | {"num_hidden_layers": (config["num_hidden_layers"] or 0) - beyond}
