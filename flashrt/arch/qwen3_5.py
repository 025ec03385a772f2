"""Qwen 3.5, text: a gated delta net in three of four layers, gated attention in the fourth, norms of 1 + w."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.arch.config import Config
from flashrt.arch.decoder import gated_ffn, layer_count
from flashrt.arch.hybrid import GGUF_HYBRID, GGUF_RECURRENT, HYBRID, RECURRENT, gguf_hybrid, hybrid_spec, with_ahead
from flashrt.arch.metadata import Metadata
from flashrt.errors import CheckpointError
from flashrt.spec import ModelSpec

NAMES = with_ahead(
    replace(
        HYBRID,
        recurrent={
            **RECURRENT,
            "qkv": ("linear_attn.in_proj_qkv.weight",),
            "gate": ("linear_attn.in_proj_z.weight",),
            "beta": ("linear_attn.in_proj_b.weight",),
            "decay": ("linear_attn.in_proj_a.weight",),
        },
    )
)
GGUF = replace(GGUF_HYBRID, recurrent={**GGUF_RECURRENT, "beta": ("ssm_beta.weight",), "decay": ("ssm_alpha.weight",)})
_SECTIONS = "rope.dimension_sections"
GGUF_KEYS = (_SECTIONS, "nextn_predict_layers")


def spec(config: Config) -> ModelSpec:
    return hybrid_spec(config, [gated_ffn(config)] * layer_count(config))


def gguf(config: Mapping[str, Any], fields: Metadata) -> dict[str, Any]:
    """llama.cpp's converter stores heads of values tiled: neighbours read from neighbouring keys."""
    sections = fields.integers(_SECTIONS)
    if sections is not None and 2 * sum(sections) != fields.integer("rope.dimension_count"):
        raise CheckpointError(f"GGUF metadata: {_SECTIONS} is {list(sections)}, which is not what is rotated")
    return gguf_hybrid(config, fields) | {"tiled_value_heads": True}
