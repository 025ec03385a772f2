"""The registry of families: what documents say of it, what they refuse, and manifests that are older than a block."""

from __future__ import annotations

import json
import re
from array import array
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashrt.arch import FAMILIES, family_of
from flashrt.arch.gguf import ARCHITECTURES, gguf_config
from flashrt.errors import CheckpointError, UnsupportedModelError, UsageError
from flashrt.rope import parse_rope_scaling
from flashrt.spec import DeltaNet, ModelSpec
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.gguf_header import read_gguf_header
from tests import hybrids, latents
from tests.fake_source import DENSE
from tests.families import FAMILIES as VARIANTS
from tests.families import GGUF_FIELDS, SHAPE, tiny_checkpoint, tiny_gguf

ROOT = Path(__file__).parents[2]
CONFIG = {
    **SHAPE,
    "num_hidden_layers": 2,
    "head_dim": 20,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
}


TWO_FULL = {"layer_types": ["full_attention"] * 2}
_OWN = {
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 104},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "moe_intermediate_size": 24},
}


def _gemma4_ropes(share: float) -> dict[str, Any]:
    full = {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": 1e6}
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


def test_the_readme_names_every_family() -> None:
    section = (ROOT / "README.md").read_text().split("\n## Families\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| ([^|]+) \|$", section, re.MULTILINE)
    rows = [row for row in rows if "model_type" not in row[0]]
    named = {name: gguf for names, gguf in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(named) == set(FAMILIES)
    known = {name for text in named.values() for name in re.findall(r"`([\w-]+)`", text)}
    assert known == set(ARCHITECTURES)


def table_of_blocks() -> list[list[str]]:
    text = (ROOT / "docs/design/families.md").read_text()
    return [line.split("|") for line in text.splitlines() if line.startswith("| ")][2:]


def test_the_table_of_blocks_names_families_and_tests_that_exist() -> None:
    rows = table_of_blocks()
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"\b[a-z]\w+\b", row[3].split(";")[0])
        assert set(names) <= set(FAMILIES), names
        assert (ROOT / row[5].strip().strip("`")).exists(), row


def test_the_table_of_blocks_names_every_family_that_has_one(tmp_path: Path) -> None:
    """By the tiny models: a block is used where its field of the spec does not hold its default."""
    used: dict[str, set[str]] = {}
    for variant in VARIANTS:
        spec = open_checkpoint(tiny_checkpoint(variant, tmp_path / variant)[1]).spec
        parts = [spec, *spec.layers, *(layer.mixer for layer in spec.layers), *(layer.ffn for layer in spec.layers)]
        for part in {*parts, *(a.rope for a in spec.attentions.values() if a.rope is not None)}:
            for field in fields(part):
                if field.default is not MISSING and getattr(part, field.name) != field.default:
                    used.setdefault(field.name, set()).add(spec.family)
    for row in table_of_blocks():
        names = re.findall(r"`(?:\w+\.)?(\w+)`", row[2])
        if "none" not in row[2] and " is " not in row[2]:
            families = set.union(set(), *(used.get(name, set()) for name in names))
            missing = [name for name in families if not re.search(rf"\b{name}(_text)?\b", row[3])]
            assert not missing, (row[1], missing)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("phi3", {"partial_rotary_factor": 0.3, "head_dim": 10}, "partial_rotary_factor=0.3 of heads of 10"),
        ("glm4", {"partial_rotary_factor": 0.0}, "partial_rotary_factor=0.0"),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor=1.5"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0.0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier is 0.0"),
        ("granite", {"logits_scaling": -8}, "logits_scaling is -8.0"),
        ("glm4", {"mlp_bias": True}, "mlp_bias"),
        ("olmo2", {"mlp_bias": True}, "mlp_bias"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 2}, "sliding layers without sliding_window"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("olmo3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters has"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("llama4_text", {"num_experts_per_tok": 2}, "a router that weighs the input of 2 experts"),
        ("llama4_text", {"layer_types": ["sliding_attention"] * 2}, "layer_types names ['sliding_attention']"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit is 0.0"),
        ("ernie4_5_moe", {"moe_norm_min": 0.9}, "moe_norm_min=0.9"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias"),
        ("glm4_moe", {"topk_method": "greedy"}, "topk_method"),
        ("glm4_moe", {"scoring_func": "softmax"}, "scoring_func"),
        ("glm4_moe", {"n_group": 3, "topk_group": 1}, "1 of 3 groups of 8 experts"),
        ("ministral3", {"layer_types": ["full_attention"] * 2, "sliding_window": 4}, "'full_attention' layers"),
        ("dots1", {"n_group": None, "topk_group": 2}, "topk_group is 2"),
        ("ministral3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, "original_max_position_embeddings"),
        ("gemma4_text", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "per-layer embeddings of 262144 of 131 tokens"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "no full_attention layer is before the 1 that share"),
        ("gemma4_text", {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention' layers"),
        ("gemma4_text", {"global_head_dim": 578}, "heads of 578 numbers"),
        ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 4}, "6 heads are not a multiple of 4"),
        ("gemma4_text", {"per_layer_config": {"1": {"sliding_window": 3}}}, "'sliding_window' in per_layer_config"),
        ("gemma4_text", {**TWO_FULL, "per_layer_config": {"1": {"head_dim": 8}}}, "heads of different kinds"),
        ("gemma4_text", {"per_layer_config": {"1": {"head_dim": "8"}}}, "head_dim is '8'"),
        (
            "gemma4_text",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "say nothing of sliding_attention",
        ),
        ("gemma4_text", {"rope_parameters": _gemma4_ropes(1.5)}, "'proportional' of 1.5 of a head"),
        ("gemma4_text", {"rope_parameters": _gemma4_ropes(0.0)}, "'proportional' of 0.0 of a head"),
        ("gemma4_text", {"enable_moe_block": True}, "num_experts is None"),
        ("gemma4_text", {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5}, "top_k_experts is 5"),
        ("gemma4_text", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ("glm4", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type='proportional'"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, change: dict[str, Any], reason: str) -> None:
    own = _OWN.get(family, {})
    family_of(family).spec({**CONFIG, **own})
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(reason)):
        family_of(family).spec({**CONFIG, **own, **change})


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"llama.attention.scale": 0.1}),
        ("llama", {"llama.attn_logit_softcapping": 50.0}),
        ("qwen3", {"qwen3.attention.sliding_window_pattern": 2}),
        ("qwen3", {"qwen3.rope.dimension_count": 10}),
        ("gemma2", {"gemma2.attention.sliding_window_pattern": 3}),
        ("granite", {"granite.rope.scaling.finetuned": False}),
        ("glm4", {"glm4.rope.dimension_sections": [8, 12, 12, 0]}),
        ("glm4", {"glm4.rope.dimension_count": 22}),
        ("glm4_moe", {"glm4moe.expert_gating_func": 1}),
        ("qwen3_moe", {"qwen3moe.swiglu_clamp_exp": 7.0}),
        ("qwen3_moe", {"qwen3moe.expert_gating_func": 2}),
        ("qwen3_moe", {"qwen3moe.expert_weights_scale": 2.5}),
        ("qwen3_moe", {"qwen3moe.expert_shared_count": 1}),
        ("llama", {"llama.leading_dense_block_count": 1}),
        ("llama", {"llama.nextn_predict_layers": 1}),
        ("llama", {"llama.attention.shared_kv_layers": 1}),
        ("llama", {"llama.embedding_length_per_layer_input": 8}),
        ("gemma4", {"gemma4.attention.value_length_swa": 18}),
        ("gemma4", {"gemma4.rope.dimension_count_swa": 10}),
        ("gemma4", {"gemma4.attention.head_count_kv": array("i", [3, 1, 3])}),
        ("gemma4", {"gemma4.feed_forward_length": array("i", [104, 104, 104, 104, 208])}),
        ("gemma4", {"gemma4.attention.sliding_window_pattern": array("B", [1] * 5)}),
    ],
)
def test_metadata_that_is_not_computed_is_refused(family: str, change: dict[str, Any], tmp_path: Path) -> None:
    header = read_gguf_header(tiny_gguf(family, tmp_path / "x.gguf", **GGUF_FIELDS.get(family, {}))[1])
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    key = next(iter(change)).partition(".")[2]
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(key)):
        gguf_config({**header.metadata, **change}, shapes.get, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention.shared_kv_layers": 4}, "no full_attention layer is before the 4 that share"),
        ({"attention.shared_kv_layers": 5}, "feed_forward_length"),
        ({"attention.shared_kv_layers": -1}, "num_kv_shared_layers is -1"),
        ({"attention.head_count_kv": array("i", [3, 1, 3, 2, 1])}, "sliding_attention layers have heads of different"),
        ({"expert_count": 4}, "moe_intermediate_size is None"),
        ({"embedding_length_per_layer_input": -3}, "hidden_size_per_layer_input is -3"),
        ({"feed_forward_length": 0}, "intermediate_size is 0"),
        ({"final_logit_softcapping": -2.0}, "final_logit_softcapping is -2.0"),
    ],
)
def test_what_gemma_4s_metadata_contradicts_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    header = read_gguf_header(tiny_gguf("gemma4", tmp_path / "x.gguf")[1])
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    family_of("gemma4_text").spec(gguf_config(header.metadata, shapes.get, {}))
    changed = {f"gemma4.{key}": value for key, value in change.items()}
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(reason)):
        family_of("gemma4_text").spec(gguf_config({**header.metadata, **changed}, shapes.get, {}))
    del shapes["blk.2.attn_v.weight"]
    with pytest.raises(UnsupportedModelError, match=r"without values in layers \[1, 2, 4\].*expected \[1, 4\]"):
        gguf_config(header.metadata, shapes.get, {})


def test_null_caps_are_none() -> None:
    spec = family_of("gemma2").spec({**CONFIG, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (spec.layers[0].attention.softcap, spec.logit_softcap) == (0.0, 0.0)
    published = family_of("gemma2").spec(CONFIG)
    assert (published.layers[0].attention.softcap, published.logit_softcap) == (50.0, 30.0)


def test_manifests_name_blocks_only_where_they_are_used() -> None:
    """A pack made before a block keeps its hash; what a block says survives."""
    written = DENSE.to_json()
    attention = written["layers"][0]["layer"]["attention"]
    assert not {"softcap", "qk_norm_whole", "temperature", "output_gate", "sinks"} & set(attention)
    assert not {"router_scores", "router_scale", "shared"} & set(written["layers"][0]["layer"]["ffn"])
    assert not {"pre_norms", "parallel", "logit_scale", "logit_softcap", "norm_bias", "residual_scale"} & set(written)
    assert "dims" not in attention["rope"]
    own = DENSE.layers[0]
    assert own.attention.rope is not None
    changed = replace(
        own.attention,
        softcap=2.5,
        qk_norm_whole=True,
        temperature=0.1,
        temperature_span=7,
        output_gate=True,
        sinks=True,
        temperature_first=1,
        qk_unit=True,
        rope=replace(own.attention.rope, dims=4),
    )
    mixture = replace(
        own.ffn, experts=12, experts_per_token=3, router_scores="sigmoid", router_correction=True, shared=8
    )
    mixture = replace(
        mixture, router_groups=4, router_groups_used=2, router_scale=2.5, router_bias=True, shared_gate=True
    )
    net = DeltaNet(2, 4, 8, 10, taps=3, tiled=True)
    single = replace(mixture, experts_per_token=1, router_input=True)
    layers = (
        replace(own, mixer=changed),
        replace(own, mixer=net),
        replace(own, ffn=mixture),
        replace(own, ffn=single),
    )
    spec = replace(DENSE, layers=layers, pre_norms=False, residual_scale=0.5, logit_scale=2.0, logit_softcap=3.0)
    spec = replace(spec, parallel=True, norm="layer", norm_bias=False)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_chunks_bound_the_context() -> None:
    """Of Llama 4: up to one chunk, attention to chunks is attention to everything."""
    own = {"num_experts_per_tok": 1, "intermediate_size_mlp": 104, "max_position_embeddings": 1 << 20}
    for change, context in (
        ({}, 8192),
        ({"attention_chunk_size": 512}, 512),
        ({"attention_chunk_size": None}, 1 << 20),
        ({"layer_types": ["full_attention"] * 2}, 1 << 20),
    ):
        spec = family_of("llama4_text").spec({**CONFIG, **own, **change})
        assert spec.context == context
        if context < 1 << 20:
            with pytest.raises(UsageError, match=f"no more than {context} tokens are computed"):
                spec.scaled(parse_rope_scaling("yarn:4"))


@pytest.mark.parametrize(
    ("published", "meant"),
    [({"no_rope_layers": []}, {}), ({"attn_temperature_tuning": 4}, {"attn_temperature_tuning": True})],
)
def test_what_published_llama_4_says_in_its_own_ways(published: dict[str, Any], meant: dict[str, Any]) -> None:
    own = {"num_experts_per_tok": 1, "intermediate_size_mlp": 104}
    found, expected = (family_of("llama4_text").spec({**CONFIG, **own, **change}) for change in (published, meant))
    assert found == expected
    assert any(layer.attention.rope is not None for layer in found.layers)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("olmoe", "num_experts"),
        ("mixtral", "num_local_experts"),
        ("qwen3_moe", "num_experts"),
        ("dots1", "n_routed_experts"),
        ("llama4_text", "num_local_experts"),
        ("gpt_oss", "num_local_experts"),
    ],
)
def test_experts_are_bounded_before_anything_is_made_of_them(family: str, key: str) -> None:
    own = {"num_experts_per_tok": 1, "intermediate_size_mlp": 104, "norm_topk_prob": True, "sliding_window": 16}
    with pytest.raises(CheckpointError, match=r"experts, expected at most 16384"):
        family_of(family).spec({**CONFIG, **own, key: 1 << 30})


def test_windows_that_dots1_has_unless_it_says_none() -> None:
    for change, windows in (({}, [None, 4096]), ({"sliding_window": None}, [None, None])):
        spec = family_of("dots1").spec({**CONFIG, "max_window_layers": 1, **change})
        assert [layer.attention.window for layer in spec.layers] == windows


def test_a_layer_with_two_mixers_is_refused() -> None:
    written = DENSE.to_json()
    written["layers"][0]["layer"]["delta_net"] = {"key_heads": 2, "heads": 4, "key_dim": 8, "value_dim": 10, "taps": 3}
    with pytest.raises(ValueError, match="too many values"):
        ModelSpec.from_json(written)


def test_layers_that_only_predict_further_tokens_are_not_read(tmp_path: Path) -> None:
    """Those behind the last of GLM-4.5, which say by a tensor of their own what they are; any others are refused."""
    _, directory = tiny_checkpoint("glm4_moe", tmp_path)
    weights = load_file(directory / "model.safetensors")
    further = {
        name.replace("layers.2.", "layers.3."): value.clone() for name, value in weights.items() if ".layers.2." in name
    }
    for eh_proj in (True, False):
        own = {"model.layers.3.eh_proj.weight": torch.randn(72, 144)} if eh_proj else {}
        save_file({**weights, **further, **own}, directory / "model.safetensors", {"format": "pt"})
        with open_checkpoint(directory) as checkpoint:
            if eh_proj:
                checkpoint.validate()
                continue
            with pytest.raises(UnsupportedModelError, match=r"model\.layers\.3\."):
                checkpoint.validate()


def test_further_layers_of_a_gguf_file_are_not_read(tmp_path: Path) -> None:
    further = {"blk.3.nextn.eh_proj.weight": np.ones((72, 144), np.float32), "blk.3.attn_norm.weight": np.ones(72)}
    _, path = tiny_gguf("glm4_moe", tmp_path / "x.gguf", extra=further)
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.spec.layers) == 3
        checkpoint.validate()
    _, path = tiny_gguf("glm4_moe", tmp_path / "y.gguf", extra={"blk.3.attn_norm.weight": np.ones(72)})
    with open_checkpoint(path) as checkpoint, pytest.raises(UnsupportedModelError, match=r"blk\.3\.attn_norm"):
        checkpoint.validate()


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_5_moe_text"])
@pytest.mark.parametrize("listed", [True, False])
def test_further_layers_of_a_hybrid_are_not_read(tmp_path: Path, family: str, listed: bool) -> None:
    further = {"blk.4.nextn.eh_proj.weight": np.ones((72, 144), np.float32), "blk.4.attn_norm.weight": np.ones(72)}
    arch, recurrent = {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe"}[family], [True, True, False, True]
    layers = [*recurrent, False] if listed else recurrent  # as llama.cpp counts them, or without
    metadata = {f"{arch}.block_count": 5, f"{arch}.nextn_predict_layers": 1}
    _, path = tiny_gguf(
        family,
        tmp_path / "x.gguf",
        extra=further,
        metadata={**metadata, f"{arch}.attention.recurrent_layers": layers},
    )
    with open_checkpoint(path) as checkpoint:
        assert [i in checkpoint.spec.delta_nets for i in range(4)] == recurrent
        assert len(checkpoint.spec.layers) == 4
        checkpoint.validate()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["sliding_attention"] * 4}, "'sliding_attention' layers"),
        ({"layer_types": ["full_attention"]}, "expected 4 names"),
        ({"linear_num_key_heads": 4}, "6 heads of a delta net do not share 4 key heads"),
        ({"linear_conv_kernel_dim": 9}, "a convolution of 9 taps"),
        ({"linear_value_head_dim": 1024}, "heads of 1024 numbers"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim is 0"),
        ({"partial_rotary_factor": 0.0, "rope_parameters": {}}, "partial_rotary_factor=0.0"),
    ],
)
def test_hybrids_that_are_not_computed_are_refused(change: dict[str, Any], reason: str) -> None:
    config = {**SHAPE, **hybrids.SHAPE, **change}
    with pytest.raises((UnsupportedModelError, CheckpointError), match=reason):
        family_of("qwen3_5_text").spec(config)


def test_a_hybrid_without_layer_types_attends_in_every_fourth_layer() -> None:
    config = {key: value for key, value in {**SHAPE, **hybrids.SHAPE}.items() if key != "layer_types"}
    assert list(family_of("qwen3_5_text").spec({**config, "num_hidden_layers": 9}).attentions) == [3, 7]
    every = {**config, "num_hidden_layers": 9, "full_attention_interval": 3}
    assert list(family_of("qwen3_5_text").spec(every).attentions) == [2, 5, 8]


LATENT = {**CONFIG, **latents.SHAPE, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads=1"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"qk_head_dim": 21}, "qk_head_dim=21"),
        ("deepseek_v3", {"head_dim": 128}, "head_dim=128"),
        ("deepseek_v3", {"qk_rope_head_dim": 5}, "qk_rope_head_dim=5"),
        ("deepseek_v3", {"kv_lora_rank": 600}, "keys of 600 + 6 numbers are wider than the 576"),
        ("deepseek_v3", {"kv_lora_rank": 20}, "latents of 20 numbers"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": -1.0}}, "mscale_all_dim"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "1 of 3 groups"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense", "other", "sparse"]}, "mlp_layer_types"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 3, "first_k_dense_replace": 1}, "mlp_layer_types are not"),
        ("glm4_moe_lite", {"first_k_dense_replace": 2}, "first_k_dense_replace=2"),
    ],
)
def test_latent_attention_that_is_not_computed_is_refused(family: str, change: dict[str, Any], reason: str) -> None:
    own = {key: value for key, value in LATENT.items() if key != "head_dim"} | {"n_group": 1, "topk_group": 1}
    family_of(family).spec(own)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(reason)):
        family_of(family).spec({**own, **change})


def test_kimi_k2_is_read_as_deepseek_v3() -> None:
    own = {key: value for key, value in LATENT.items() if key != "head_dim"} | {"n_group": 1, "topk_group": 1}
    found, expected = (family_of(name).spec(own) for name in ("kimi_k2", "deepseek_v3"))
    assert replace(found, family="deepseek_v3") == expected
    assert family_of("kimi_k2").names == family_of("deepseek_v3").names


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention.key_length": 20}, "key_length and value_length are 1, 20 and 24, expected 1, 30 and 24"),
        ({"attention.head_count_kv": 6}, "are 6, 30 and 24, expected 1, 30 and 24"),
        ({"attention.key_length_mla": 6}, "heads of 6 and 16 numbers, 6 of them rotated"),
        ({"attention.kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"rope.scaling.yarn_log_multiplier": 0.0}, "no rope.scaling.yarn_log_multiplier"),
        ({"expert_gating_func": 3}, "expert_gating_func=3"),
    ],
)
def test_latent_metadata_that_contradicts_itself_is_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    header = read_gguf_header(tiny_gguf("deepseek_v3", tmp_path / "x.gguf")[1])
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    changed = {f"deepseek2.{key}": value for key, value in change.items()}
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(reason)):
        family_of("deepseek_v3").spec(gguf_config({**header.metadata, **changed}, shapes.get, {}))
