"""What GGUF metadata says of Gemma 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.arch.gemma3 import layer_types
from flashrt.arch.gemma4 import FULL, SLIDING
from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError, UnsupportedModelError

KEYS = (
    "attention.shared_kv_layers",
    "attention.sliding_window_pattern",
    "embedding_length_per_layer_input",
    "final_logit_softcapping",
)
BY_LAYER = ("intermediate_size", "num_key_value_heads")


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    types = layer_types(config, fields)
    if types[-1] != FULL:
        raise UnsupportedModelError(
            "GGUF gemma4 with attention.sliding_window_pattern by which the last layer slides is not supported"
        )
    head_dim = fields.integer("attention.key_length_swa", config["head_dim"])
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if (found := fields.integer(key, head_dim)) != head_dim:
            raise UnsupportedModelError(f"GGUF with {key}={found} but head size {head_dim} is not supported")
    kv_heads = _of_layers(fields, "attention.head_count_kv", len(types), config["num_attention_heads"])
    dims = {SLIDING: head_dim, FULL: config["head_dim"]}
    shapes = [{"head_dim": dims[kind], "num_key_value_heads": n} for kind, n in zip(types, kv_heads, strict=True)]
    shared = fields.integer("attention.shared_kv_layers", 0)
    full = [i for i, kind in enumerate(types[: len(types) - shared]) if kind == FULL]
    without = [i for i in config["layers_without_values"] if i < len(types) - shared]
    if without not in ([], full):
        raise UnsupportedModelError(
            f"GGUF gemma4 without values in layers {without} is not supported, expected {full} or none"
        )
    return {
        "layer_types": types,
        **shapes[0],
        "per_layer_config": {str(i): shape for i, shape in enumerate(shapes)},
        "attention_k_eq_v": bool(without),
        "sliding_window": fields.integer("attention.sliding_window"),
        "final_logit_softcapping": fields.number("final_logit_softcapping"),
        "hidden_size_per_layer_input": fields.integer("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "num_kv_shared_layers": shared,
        **_widths(fields, len(types), shared),
        "enable_moe_block": bool(fields.integer("expert_count", 0)),
        "num_experts": fields.integer("expert_count"),
        "top_k_experts": fields.integer("expert_used_count"),
        "moe_intermediate_size": fields.integer("expert_feed_forward_length"),
        "rope_parameters": {
            FULL: config["rope_parameters"],
            SLIDING: {"rope_theta": fields.number("rope.freq_base_swa", 10000.0)},
        },
    }


def _widths(fields: Metadata, layers: int, shared: int) -> dict[str, Any]:
    """Of the feed-forward blocks: the same of all layers, or twice that of those that share keys and values."""
    found = _of_layers(fields, "feed_forward_length", layers, 0)
    own, others = set(found[: layers - shared]), set(found[layers - shared :])
    if len(own) != 1 or len(others) > 1 or not others <= {min(own), 2 * min(own)}:
        raise UnsupportedModelError(f"GGUF gemma4 with feed_forward_length={found!r:.80} is not supported")
    return {"intermediate_size": min(own), "use_double_wide_mlp": bool(others - own)}


def _of_layers(fields: Metadata, key: str, layers: int, default: int) -> list[int]:
    """The number that a field gives to each layer, or all of them."""
    found = fields.per_layer(key)
    numbers = [default if found is None else found] * layers if found is None or isinstance(found, int) else [*found]
    if len(numbers) != layers:
        raise CheckpointError(f"GGUF metadata: {key} has {len(numbers)} numbers, expected {layers}")
    return numbers
