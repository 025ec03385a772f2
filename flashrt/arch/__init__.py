"""Families of models: Hugging Face configs and tensor names → ModelSpec and TensorMap. No forward code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flashrt.arch import (
    cohere,
    deepseek,
    dots1,
    ernie4_5_moe,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    llama,
    llama4,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    opt,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
)
from flashrt.arch.ahead import ahead_tensors
from flashrt.arch.config import Config
from flashrt.arch.names import GGUF_NAMES, GGUF_PERMUTED, Has, Names, Part, TensorMap
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.spec import ModelSpec

__all__ = ["FAMILIES", "Family", "Part", "TensorMap", "ahead_tensors", "family_of"]


@dataclass(frozen=True, slots=True)
class Family:
    """One supported architecture: how its config reads, and what its tensors are called."""

    name: str
    spec_of: Callable[[Config], ModelSpec]
    names: Names
    gguf: Names = GGUF_NAMES

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The spec that a Hugging Face config (or one made from GGUF metadata) describes.

        Raises CheckpointError, and UnsupportedModelError for what the kernels cannot compute.
        """
        spec = self.spec_of(Config(config, self.name))
        if problem := spec.unsupported():
            raise UnsupportedModelError(f"this {self.name} model is not supported: {problem}")
        for rope, head_dim in {(a.rope, a.head_dim) for a in spec.attentions.values()}:
            if rope is not None and (problem := rope.problem(head_dim, spec.context)):
                raise CheckpointError(f"{self.name} config: {problem}")
        return spec

    def tensors(self, spec: ModelSpec, has: Has) -> TensorMap:
        """Tensor names of a Hugging Face checkpoint."""
        names = self.names
        if self.name == "mixtral" and has("model.layers.0.mlp.gate.weight"):
            names = mixtral.NEW_NAMES
        return names.resolve(spec, has)

    def gguf_tensors(self, spec: ModelSpec, has: Has) -> TensorMap:
        """Tensor names of a GGUF file."""
        return self.gguf.resolve(spec, has)


_GEMMA3 = Family("gemma3", gemma3.spec, gemma3.NAMES)
FAMILIES: dict[str, Family] = {
    # llama.cpp's converter permutes query and key rows of llama, mistral, mixtral, granite and smollm3.
    "llama": Family("llama", llama.spec, llama.NAMES, GGUF_PERMUTED),
    "llama4_text": Family("llama4", llama4.spec, llama4.NAMES, GGUF_PERMUTED),
    "mistral": Family("mistral", mistral.spec, mistral.NAMES, GGUF_PERMUTED),
    "mixtral": Family("mixtral", mixtral.spec, mixtral.NAMES, GGUF_PERMUTED),
    "qwen2": Family("qwen2", qwen2.spec, qwen2.NAMES),
    "qwen2_moe": Family("qwen2_moe", qwen2_moe.spec, qwen2_moe.NAMES),
    "qwen3": Family("qwen3", qwen3.spec, qwen3.NAMES),
    "qwen3_next": Family("qwen3_next", qwen3_next.spec, qwen3_next.NAMES, qwen3_next.GGUF),
    "qwen3_5_moe_text": Family("qwen3_5_moe_text", qwen3_next.moe_spec, qwen3_next.MOE_NAMES, qwen3_next.MOE_GGUF),
    "qwen3_5_text": Family("qwen3_5_text", qwen3_5.spec, qwen3_5.NAMES, qwen3_5.GGUF),
    "qwen3_moe": Family("qwen3_moe", qwen3_moe.spec, qwen3_moe.NAMES),
    "gemma2": Family("gemma2", gemma2.spec, gemma2.NAMES),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma4_text": Family("gemma4", gemma4.spec, gemma4.NAMES, gemma4.GGUF),
    "gemma4_unified_text": Family("gemma4", gemma4.unified_spec, gemma4.NAMES, gemma4.GGUF),
    "opt": Family("opt", opt.spec, opt.NAMES),
    "phi3": Family("phi3", phi3.spec, phi3.NAMES, phi3.GGUF),
    "olmo2": Family("olmo2", olmo2.spec, olmo2.NAMES),
    "olmo3": Family("olmo3", olmo2.spec3, olmo2.NAMES),
    "granite": Family("granite", granite.spec, granite.NAMES, GGUF_PERMUTED),
    "granitemoe": Family("granitemoe", granite.moe_spec, granite.MOE_NAMES, GGUF_PERMUTED),
    "granitemoeshared": Family("granitemoeshared", granite.moe_spec, granite.MOE_NAMES, GGUF_PERMUTED),
    "gpt_oss": Family("gpt_oss", gpt_oss.spec, gpt_oss.NAMES, gpt_oss.GGUF),
    "olmoe": Family("olmoe", olmoe.spec, olmoe.NAMES),
    "deepseek_v2": Family("deepseek_v2", deepseek.v2_spec, deepseek.NAMES, deepseek.GGUF),
    "deepseek_v3": Family("deepseek_v3", deepseek.v3_spec, deepseek.NAMES, deepseek.GGUF),
    "kimi_k2": Family("kimi_k2", deepseek.v3_spec, deepseek.NAMES, deepseek.GGUF),
    "dots1": Family("dots1", dots1.spec, dots1.NAMES),
    "ernie4_5_moe": Family("ernie4_5_moe", ernie4_5_moe.spec, ernie4_5_moe.NAMES, ernie4_5_moe.GGUF),
    "glm4_moe": Family("glm4_moe", glm4_moe.spec, glm4_moe.NAMES, glm4_moe.GGUF),
    "glm4_moe_lite": Family("glm4_moe_lite", glm4_moe.lite_spec, glm4_moe.LITE_NAMES, deepseek.GGUF),
    "smollm3": Family("smollm3", smollm3.spec, smollm3.NAMES, GGUF_PERMUTED),
    "glm4": Family("glm4", glm4.spec, glm4.NAMES, glm4.GGUF),
    "ministral": Family("ministral", mistral.spec, mistral.NAMES, GGUF_PERMUTED),
    "ministral3": Family("ministral3", ministral3.spec, ministral3.NAMES, GGUF_PERMUTED),
    "cohere": Family("cohere", cohere.spec, cohere.NAMES, GGUF_PERMUTED),
    "cohere2": Family("cohere2", cohere.spec2, cohere.NAMES, GGUF_PERMUTED),
    "seed_oss": Family("seed_oss", seed_oss.spec, seed_oss.NAMES, seed_oss.GGUF),
}
"""model_type of a Hugging Face config → family."""


def family_of(model_type: object) -> Family:
    """The family of a config's model_type. Raises UnsupportedModelError naming it."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} is not supported; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
