"""Models that see, run by their text alone, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from flashrt.arch import family_of
from flashrt.arch.wrappers import _DEFAULTS, _TEXT_OF, WRAPPERS, text_config
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, relative_rms, tiny_engine
from tests.families import SHAPE, write_tokenizer
from tests.hybrids import MIXTURE
from tests.hybrids import SHAPE as HYBRID

TEXT = {**SHAPE, "pad_token_id": 3}
EYES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **EYES, "image_size": 28, "patch_size": 14, "projection_dim": 8}
SIGLIP = CLIP | {"model_type": "siglip_vision_model"}
PIXTRAL = {"model_type": "pixtral", **EYES, "image_size": 28, "patch_size": 14, "head_dim": 8}
INTERN = {"model_type": "internvl_vision", **EYES, "image_size": [28, 28], "patch_size": [14, 14]}
QWEN = {"depth": 2, "embed_dim": 16, "hidden_size": 72, "num_heads": 2, "patch_size": 14}
QWEN25 = {"depth": 2, "hidden_size": 16, "out_hidden_size": 72, "num_heads": 2, "intermediate_size": 16}
IMAGES = {"image_token_id": 130, "video_token_id": 129}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "factor": 4.0}

GEMMA4 = {
    "head_dim": 20,
    "global_head_dim": 28,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": SHAPE["vocab_size"],
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "sliding_window": 6,
    "final_logit_softcapping": 5.0,
}
DENSE = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "attention_k_eq_v": True}


def text(family: str, **fields: Any) -> dict[str, Any]:
    return {**TEXT, "model_type": family, **fields}


# Case → (prefix of transformers' class names, fields of the configuration).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("Llava", {"text_config": text("llama"), "vision_config": CLIP}),
    "llava, tied": ("Llava", {"text_config": text("qwen2", tie_word_embeddings=True), "vision_config": SIGLIP}),
    "llava_next": ("LlavaNext", {"text_config": text("mistral", sliding_window=None), "vision_config": CLIP}),
    "llava_next_video": ("LlavaNextVideo", {"text_config": text("llama"), "vision_config": CLIP}),
    "llava_onevision": ("LlavaOnevision", {"text_config": text("qwen2"), "vision_config": SIGLIP}),
    "vipllava": ("VipLlava", {"text_config": text("llama"), "vision_config": CLIP}),
    "video_llava": ("VideoLlava", {"text_config": text("llama"), "vision_config": CLIP}),
    "mistral3": ("Mistral3", {"text_config": text("mistral", head_dim=20), "vision_config": PIXTRAL}),
    "mistral3, untied": (
        "Mistral3",
        {"text_config": text("mistral", sliding_window=6), "vision_config": PIXTRAL, "tie_word_embeddings": False},
    ),
    "qwen2_vl": ("Qwen2VL", {"text_config": {**TEXT, "rope_parameters": SECTIONS}, "vision_config": QWEN, **IMAGES}),
    "qwen2_vl, yarn": ("Qwen2VL", {"text_config": {**TEXT, "rope_parameters": YARN}, "vision_config": QWEN, **IMAGES}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**TEXT, "rope_parameters": SECTIONS, "tie_word_embeddings": True},
            "vision_config": QWEN25 | {"fullatt_block_indexes": [1]},
            **IMAGES,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**TEXT, "head_dim": 12, "rope_parameters": SECTIONS | {"mrope_interleaved": True}},
            "vision_config": QWEN25 | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            **IMAGES,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "text_config": {**TEXT, **HYBRID, "model_type": "qwen3_5_text"},
            "vision_config": QWEN25 | {"num_position_embeddings": 16},
            **IMAGES,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "text_config": {**TEXT, **HYBRID, **MIXTURE, "model_type": "qwen3_5_moe_text"},
            "vision_config": QWEN25 | {"num_position_embeddings": 16},
            **IMAGES,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "text_config": text("llama4_text", intermediate_size_mlp=104, head_dim=12, num_local_experts=3),
            "vision_config": {**EYES, "vision_output_dim": 16, "image_size": 28, "patch_size": 14},
        },
    ),
    "gemma4": (
        "Gemma4",
        {
            "text_config": text("gemma4_text", **GEMMA4),
            "vision_config": {"model_type": "gemma4_vision", **EYES, "head_dim": 8, "patch_size": 4},
            "audio_config": None,
            "image_token_id": 130,
        },
    ),
    "gemma4_unified": ("Gemma4Unified", {"text_config": text("gemma4_unified_text", **GEMMA4 | DENSE)}),
    "gemma4, untied, dense": (
        "Gemma4",
        {
            "text_config": text("gemma4_text", **GEMMA4 | DENSE),
            "tie_word_embeddings": False,
        },
    ),
    "internvl": ("InternVL", {"text_config": text("qwen2"), "vision_config": INTERN}),
    "idefics3": ("Idefics3", {"text_config": text("llama"), "vision_config": CLIP}),
    "smolvlm": ("SmolVLM", {"text_config": text("llama"), "vision_config": CLIP}),
}


def save(case: str, directory: Path) -> Any:
    """A random model of a case, saved with a tokenizer."""
    import transformers

    name, fields = CASES[case]
    config = getattr(transformers, f"{name}Config")(**fields)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval().float()
        for parameter in model.parameters():
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model


def test_every_wrapper_is_tried() -> None:
    assert {case.partition(",")[0] for case in CASES} == set(WRAPPERS)


@pytest.mark.parametrize("case", CASES)
def test_text_as_transformers(case: str, tmp_path: Path) -> None:
    model = save(case, tmp_path / "checkpoint")
    ids = np.random.default_rng(0).integers(4, 120, 20).tolist()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, 8:].numpy()
    packed = make_pack(tmp_path / "checkpoint", tmp_path / "pack", Codec.F32)
    with tiny_engine(packed, 1.0) as engine:
        assert relative_rms(logits_of(engine, ids[:9], ids[9:]), expected) < 1e-4


@pytest.mark.parametrize("kind", _DEFAULTS)
def test_what_a_text_config_leaves_out_is_what_transformers_takes(kind: str) -> None:
    """As models are published: what equals a default is not written."""
    outer = next((outer for outer, text in _TEXT_OF.items() if text == kind), "llava")
    full, bare = (
        text_config({"model_type": outer, "text_config": {**fields, "model_type": kind}})
        for fields in (CONFIG_MAPPING[kind]().to_dict(), {})
    )
    assert family_of(str(full["model_type"])).spec(full) == family_of(str(bare["model_type"])).spec(bare)


def test_flat_configurations_of_qwen2_vl(tmp_path: Path) -> None:
    """As Qwen2-VL was published first: the text model's fields beside the eyes'."""
    save("qwen2_vl", tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        expected = checkpoint.spec
    config = json.loads((tmp_path / "config.json").read_text())
    flat = {**config.pop("text_config"), **config, "rope_theta": 1e4}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    flat.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.validate()
        assert checkpoint.spec == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, "'mllama' around a text model"),
        ({"model_type": "llava", "text_config": {"model_type": "mpt"}}, "'mpt' is not supported"),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral4"}}, "'ministral4' is not supported"),
        ({"model_type": "llava", "text_config": 3}, "text_config is 3, expected an object"),
    ],
)
def test_other_wrappers_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((UnsupportedModelError, CheckpointError), match=message):
        open_checkpoint(tmp_path)
