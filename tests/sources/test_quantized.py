"""Quantized checkpoints of Hugging Face: what is read of them is what their format means, and the rest is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashrt.checkpoints.pack_job import pack_checkpoint
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.kept import kept_of
from flashrt.storage.sources import Checkpoint, open_checkpoint, tensors
from tests.quantized import BLOCKS, FORMATS, MODEL, Format, changed, configure, fp8_blocks, quantized_checkpoint

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Format, Path, Path]:
    own = FORMATS[request.param]
    return own, *quantized_checkpoint(own, tmp_path_factory.mktemp(request.param), **own.extra)


def every_matrix(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    found = dict(checkpoint.spec.shared_matrices())
    for i in range(len(checkpoint.spec.layers)):
        found |= checkpoint.spec.layer_matrices(i)
    return found


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and bool(np.array_equal(a, b))


@pytest.mark.parametrize("kept", [tensors.CACHE_BYTES, 3000])
def test_every_range_is_what_the_format_means(
    case: tuple[Format, Path, Path], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns and vectors, in ranges that cut blocks, groups and words."""
    monkeypatch.setattr(tensors, "CACHE_BYTES", kept)
    with open_checkpoint(case[1]) as found, open_checkpoint(case[2]) as plain:
        found.validate()
        assert found.spec == plain.spec
        for key in plain.spec.vectors():
            assert same(found.vector(key), plain.vector(key))
        for key, (rows, _) in every_matrix(plain).items():
            for start, stop in ((0, rows), (rows // 2, rows // 2 + 1), (rows // 3, rows - 1)):
                assert same(found.matrix_rows(key, start, stop), plain.matrix_rows(key, start, stop))
        for i, layer in enumerate(plain.spec.layers):
            n = layer.ffn.neurons
            for expert in {0, layer.ffn.runs - 1}:
                for start, stop in ((0, n), (3, 4), (7, n - 5), (n // 2, n)):
                    pairs = zip(
                        found.neuron_rows(f"{i}.ffn", expert, start, stop),
                        plain.neuron_rows(f"{i}.ffn", expert, start, stop),
                        strict=True,
                    )
                    assert all(a is b if a is None else same(a, b) for a, b in pairs)


@pytest.fixture
def small(case: tuple[Format, Path, Path], tmp_path: Path) -> Path:
    """A checkpoint of one layer to damage."""
    return quantized_checkpoint(case[0], tmp_path, num_hidden_layers=1, **case[0].extra)[0]


def leaves_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one quantized module."""
    return {name: tensor for name, tensor in load_file(path / MODEL).items() if name.startswith(f"{Q0}.")}


def test_a_tensor_that_is_missing_is_named(small: Path) -> None:
    for name in leaves_of(small):
        if not re.search(r"activation|input|g_idx", name):
            with (
                changed(small, {name: None}),
                pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(name)),
                open_checkpoint(small) as checkpoint,
            ):
                checkpoint.validate()


def test_a_tensor_of_another_shape_is_named(small: Path) -> None:
    for name, tensor in leaves_of(small).items():
        if tensor.dim() > 0 and tensor.shape != (1,):
            with (
                changed(small, {name: torch.cat((tensor, tensor[:1]))}),
                pytest.raises(CheckpointError, match=rf"{Q0}\.\w+ (has shape|says)"),
                open_checkpoint(small) as checkpoint,
            ):
                checkpoint.validate()


def test_a_tensor_of_another_type_is_named(small: Path) -> None:
    for name, tensor in leaves_of(small).items():
        if not re.search(r"activation|input", name):
            with (
                changed(small, {name: torch.zeros(tensor.shape, dtype=torch.int16)}),
                pytest.raises(CheckpointError, match=rf"{re.escape(name)}.* is stored as I16"),
                open_checkpoint(small) as checkpoint,
            ):
                checkpoint.validate()


def test_a_stray_tensor_is_refused(small: Path) -> None:
    with (
        changed(small, {f"{Q0}.weight_scale_3": torch.ones(3)}),
        open_checkpoint(small) as checkpoint,
        pytest.raises(UnsupportedModelError, match=rf"does not use 1 of its tensors.*: {Q0}\.weight_scale_3$"),
    ):
        checkpoint.validate()


def test_a_tensor_that_is_there_twice_is_refused(small: Path) -> None:
    """As it is, and quantized."""
    if f"{Q0}.weight" not in leaves_of(small):
        with (
            changed(small, {f"{Q0}.weight": torch.ones(120, 72)}),
            pytest.raises(CheckpointError, match=rf"{Q0}\.weight is stored twice"),
        ):
            open_checkpoint(small)


def test_an_option_that_is_not_known_is_refused(case: tuple[Format, Path, Path], small: Path) -> None:
    configure(small, {**case[0].config, "rotation": "hadamard"})
    with pytest.raises(UnsupportedModelError, match="quantization with rotation='hadamard' is not supported"):
        open_checkpoint(small)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", None, ["fp8"], 3])
def test_methods_that_are_not_known_are_named(method: Any, tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS["fp8"], tmp_path, num_hidden_layers=1)
    configure(path, {"quant_method": method, "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match=re.escape(f"quantization by {method!r} is not supported; known: ")):
        open_checkpoint(path)


@pytest.mark.parametrize("quantization", ["fp8", 7, ["fp8"]])
def test_a_config_that_is_no_object(quantization: Any, tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS["fp8"], tmp_path, num_hidden_layers=1)
    configure(path, quantization)
    with pytest.raises(CheckpointError, match=r"quantization_config is .*, expected an object"):
        open_checkpoint(path)


def test_blocks_of_fp8_are_those_of_transformers(tmp_path: Path) -> None:
    """Which takes shapes of whole blocks only."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    own = Format({"quant_method": "fp8", "weight_block_size": [8, 24]}, fp8_blocks(8, 24, "weight_scale_inv"))
    path, _ = quantized_checkpoint(own, tmp_path, hidden_size=72, intermediate_size=120, num_hidden_layers=1)
    stored = load_file(path / MODEL)
    with open_checkpoint(path) as checkpoint:
        for part, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            codes, scales = (stored[f"model.layers.0.mlp.{name}.{leaf}"] for leaf in ("weight", "weight_scale_inv"))
            expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32).numpy()
            found = checkpoint.neuron_rows("0.ffn", 0, 5, 77)[("gate", "up", "down").index(part)]
            assert same(found, expected[5:77] if part != "down" else expected[:, 5:77].T)


# --- what configurations say ---


def weights_of(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors with other options of its weights."""
    group = config["config_groups"]["group_0"]
    return {**config, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


def group_of(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, "config_groups": {"group_0": {**config["config_groups"]["group_0"], **changes}}}


INT4, FP8, GPTQ, AWQ = (FORMATS[name].config for name in ("int4", "fp8", "gptq", "awq"))
REFUSED = {
    "fp8-e5m2": ("fp8", {**FP8, "fmt": "e5m2"}, "fmt='e5m2' is not supported"),
    "fp8-fp4": ("fp8", {**FP8, "expert_dtype": "fp4"}, "expert_dtype='fp4' is not supported"),
    "fp8-block": (
        "fp8",
        {**FP8, "weight_block_size": [128]},
        "weight_block_size is [128], expected two positive numbers",
    ),
    "fp8-other": (
        "fp8",
        {**FP8, "weight_block_size": [24, 24]},
        "_scale_inv has shape [3, 2], expected [3, 5]",
    ),
    "fp8-exempt": ("fp8", {**FP8, "modules_to_not_convert": ["model.layers.0.mlp"]}, "modules_to_not_convert names it"),
    "fp8-end": (
        "fp8",
        {**FP8, "ignored_layers": ["up_proj"], "modules_to_not_convert": None},
        "up_proj is stored quantized, and modules",
    ),
    "fp8-pattern": ("fp8", {**FP8, "modules_to_not_convert": ["("]}, "'(' is no regular expression: missing )"),
    "fp8-group": ("fp8", {**FP8, "modules_to_not_convert": ["(.*)*x"]}, "'(.*)*x' repeats a group"),
    "gptq-3": ("gptq", {**GPTQ, "bits": 3}, "gptq quantization with bits=3 is not supported"),
    "gptq-marlin": ("gptq", {**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not supported"),
    "gptq-dynamic": ("gptq", {**GPTQ, "dynamic": {"-:.*": {}}}, "gptq quantization with dynamic="),
    "gptq-bits": ("gptq", {**GPTQ, "bits": None}, "bits is None, expected an integer"),
    "gptq-words": ("gptq", {**GPTQ, "pack_dtype": "int16"}, "pack_dtype='int16' is not supported"),
    "gptq-group": ("gptq", {**GPTQ, "group_size": 64}, ".scales has shape [6, 96], expected [3, 96]"),
    "gptq-size": ("gptq", {**GPTQ, "group_size": 0}, "group_size is 0, expected an integer of at least 1"),
    "awq-gemv": ("awq", {**AWQ, "version": "gemv"}, "version='gemv' is not supported"),
    "awq-backend": ("awq", {**AWQ, "backend": "llm-awq"}, "backend='llm-awq' is not supported"),
    "awq-bits": ("awq", {**AWQ, "bits": 8}, "bits=8 is not supported"),
    "ct-format": ("int4", {**INT4, "format": "marlin-24"}, "format 'marlin-24' is not supported; known: "),
    "ct-sparse": ("int4", {**INT4, "sparsity_config": {"format": "sparse-24"}}, "format='sparse-24' is not supported"),
    "ct-rotated": ("int4", {**INT4, "transform_config": {"config_groups": {"R1": {}}}}, "with transform_config="),
    "ct-status": ("int4", {**INT4, "quantization_status": "calibration"}, "quantization_status='calibration' is not"),
    "ct-bits": ("int4", weights_of(INT4, num_bits=3), "3-bit int weights by group is not supported"),
    "ct-type": ("int4", weights_of(INT4, type="float"), "4-bit float weights by group is not supported"),
    "ct-dynamic": ("int4", weights_of(INT4, dynamic=True), "dynamic=True is not supported"),
    "ct-zeros": ("int4", weights_of(INT4, symmetric=False), "_proj.weight_zero_point is missing"),
    "ct-order": ("int4", weights_of(INT4, actorder="random"), "actorder='random' is not supported"),
    "ct-option": ("int4", weights_of(INT4, codebook=[1]), "group_0 quantization with codebook=[1] is not supported"),
    "ct-group": ("int4", weights_of(INT4, group_size=48), "has shape [96, 24], expected [96, 36]"),
    "ct-named": ("int4", {**INT4, "config_groups": {"W4A16": ["Linear"]}}, "W4A16=['Linear'] is not supported"),
    "ct-target": ("int4", group_of(INT4, targets=["re:.*mlp.*"]), "self_attn.k_proj is stored quantized, and no group"),
    "ct-ignored": ("int4", {**INT4, "ignore": ["re:.*down_proj"]}, "down_proj is stored quantized, and the quant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(name: str, tmp_path: Path) -> None:
    own, config, message = REFUSED[name]
    path, _ = quantized_checkpoint(FORMATS[own], tmp_path, num_hidden_layers=1, **FORMATS[own].extra)
    configure(path, config)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=re.escape(message)):
        open_checkpoint(path)


@pytest.mark.parametrize("group", [9, (1 << 31) - 1])
def test_what_an_order_may_not_say(group: int, tmp_path: Path) -> None:
    for own, leaf, message in (
        ("gptq-order", "g_idx", rf"g_idx says groups 0 to {group}, expected 0 to 3"),
        ("int4-order", "weight_g_idx", r"weight_g_idx does not say 4 groups of 24 columns"),
    ):
        path, _ = quantized_checkpoint(FORMATS[own], tmp_path / own, num_hidden_layers=1, **BLOCKS)
        order = load_file(path / MODEL)[f"{Q0}.{leaf}"].clone()
        order[5] = group
        with changed(path, {f"{Q0}.{leaf}": order}), pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


def test_an_order_of_nothing_is_no_order(tmp_path: Path) -> None:
    """-1 is what compressed-tensors fills it with before it is known."""
    path, plain = quantized_checkpoint(FORMATS["int4"], tmp_path, num_hidden_layers=1, **BLOCKS)
    unfilled = {f"{Q0}.weight_g_idx": torch.full((96,), -1, dtype=torch.int32)}
    with changed(path, unfilled), open_checkpoint(path) as found, open_checkpoint(plain) as expected:
        found.validate()
        assert same(found.matrix_rows("0.qkv", 0, 9), expected.matrix_rows("0.qkv", 0, 9))
        assert found.part_dtypes("0.qkv") == ("Q4_0",) * 3


def test_a_shape_that_is_told_twice(tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS["int4"], tmp_path, num_hidden_layers=1, **BLOCKS)
    shape = {f"{Q0}.weight_shape": torch.tensor([96, 95])}
    with (
        changed(path, shape),
        pytest.raises(CheckpointError, match=r"weight_shape says \[96, 95\], expected \[96, 96"),
    ):
        open_checkpoint(path)


def test_groups_of_modules_have_schemes_of_their_own(tmp_path: Path) -> None:
    """Names before patterns, patterns before classes; formats of their own in mixed precision."""
    kinds = {"o_proj": FORMATS["bytes"], "q_proj": FORMATS["float-channel"]}

    def encode(name: str) -> Format:
        return next((own for end, own in kinds.items() if name.endswith(f"{end}.weight")), FORMATS["int4"])

    path, plain = quantized_checkpoint(encode, tmp_path, num_hidden_layers=2, **BLOCKS)
    groups = {
        "group_0": {**FORMATS["int4"].config["config_groups"]["group_0"], "format": "pack-quantized"},
        "group_1": {
            **FORMATS["bytes"].config["config_groups"]["group_0"],
            "format": "int-quantized",
            "targets": ["re:model.layers.*o_proj$"],
        },
        "group_2": {
            **FORMATS["float-channel"].config["config_groups"]["group_0"],
            "format": "float-quantized",
            "targets": [Q0, "re:.*layers.1.*q_proj"],
        },
    }
    configure(path, {**INT4, "format": "mixed-precision", "config_groups": groups})
    with open_checkpoint(path) as found, open_checkpoint(plain) as expected:
        found.validate()
        for key, (rows, _) in every_matrix(expected).items():
            assert same(found.matrix_rows(key, 0, rows), expected.matrix_rows(key, 0, rows))
        assert found.part_dtypes("1.out") == ("Q8_0",)
        assert found.part_dtypes("0.qkv") == ("FP8 by row", "Q4_0", "Q4_0")


# --- what surrounds weights ---


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_of_zeros_are_no_biases(value: float, tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS["gptq"], tmp_path, num_hidden_layers=1, **BLOCKS)
    with changed(path, {f"{Q0}.bias": torch.full((96,), value, dtype=torch.float16)}), open_checkpoint(path) as found:
        if value:
            with pytest.raises(UnsupportedModelError, match=rf"does not use 1 of its tensors.*{Q0}\.bias"):
                found.validate()
        else:
            found.validate()


def test_scales_of_keys_and_values_are_left_unread(tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS["float-channel"], tmp_path, num_hidden_layers=1)
    names = [f"model.layers.0.self_attn.{kind}_scale" for kind in "qkv"]
    with changed(path, {name: torch.ones(1) for name in names}), open_checkpoint(path) as found:
        found.validate()


@pytest.mark.parametrize("name", ["int4-wide", "gptq", "float-channel"])
def test_scales_that_are_not_finite_are_refused(name: str, tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS[name], tmp_path, num_hidden_layers=1, **BLOCKS)
    leaf = "scales" if name == "gptq" else "weight_scale"
    scales = load_file(path / MODEL)[f"{Q0}.{leaf}"].clone()
    scales.view(-1)[-1] = torch.inf
    for dtype in ("auto", "int4"):
        with changed(path, {f"{Q0}.{leaf}": scales}), pytest.raises(CheckpointError, match=r"0\.q\w* .*not finite"):
            pack_checkpoint(path, tmp_path / dtype, dtype, tmp_path, lambda *_: None)


def test_scales_that_float16_does_not_hold_are_decoded(tmp_path: Path) -> None:
    """Of one matrix of all: the others are kept."""
    path, _ = quantized_checkpoint(FORMATS["int4-wide"], tmp_path, num_hidden_layers=1, **BLOCKS)
    scales = load_file(path / MODEL)[f"{Q0}.weight_scale"].clone()
    for value in (1e-6, 1e5):
        scales.view(-1)[-1] = value
        with changed(path, {f"{Q0}.weight_scale": scales}), open_checkpoint(path) as found:
            assert found.part_dtypes("0.qkv") == ("int4 by row", "Q4_0", "Q4_0")
            kept = kept_of(found)
            assert kept is not None
            assert set(kept.requantized) == {"embed", "head", "0.q"}


WAYS: dict[str, dict[str, Any]] = {
    "mixtral": {**BLOCKS, "intermediate_size": 96},
    "qwen3_moe": {**BLOCKS, "moe_intermediate_size": 96},
    "glm4": {**BLOCKS, "num_attention_heads": 12, "head_dim": 40},
    "gemma3": {**BLOCKS, "num_key_value_heads": 3},
    "opt": {"hidden_size": 96, "ffn_dim": 192, "word_embed_proj_dim": 96},
}


@pytest.mark.parametrize("name", ["fp8", "int4", "gptq-order", "awq-middle", "mxfp4"])
@pytest.mark.parametrize("family", WAYS)
def test_every_way_of_storing_blocks(name: str, family: str, tmp_path: Path) -> None:
    """Experts, rows that are fused, and other names."""
    path, plain = quantized_checkpoint(FORMATS[name], tmp_path, family, **WAYS[family])
    with open_checkpoint(path) as found, open_checkpoint(plain) as expected:
        found.validate()
        for key, (rows, _) in every_matrix(expected).items():
            assert same(found.matrix_rows(key, 0, rows), expected.matrix_rows(key, 0, rows))
        for i, layer in enumerate(expected.spec.layers):
            for expert in {0, layer.ffn.runs - 1}:
                own, wanted = (c.neuron_rows(f"{i}.ffn", expert, 3, layer.ffn.neurons - 2) for c in (found, expected))
                assert all(a is b if a is None else same(a, b) for a, b in zip(own, wanted, strict=True))


def test_stacks_of_experts_in_fp8(tmp_path: Path) -> None:
    """As transformers names the tensors of a stack: the scale of each of its matrices in one tensor."""
    path, plain = quantized_checkpoint(FORMATS["fp8"], tmp_path, "mixtral")
    stored, weights, generator = load_file(path / MODEL), load_file(plain / MODEL), torch.Generator().manual_seed(1)
    stored = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    weights = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for i in range(3):
        for name, shape in (("gate_up_proj", (80, 72)), ("down_proj", (72, 40))):
            made = [FORMATS["fp8"].encode(torch.Size(shape), generator) for _ in range(5)]
            stack = f"model.layers.{i}.mlp.experts.{name}"
            stored[stack] = torch.stack([own["weight"].view(torch.uint8) for own, _ in made]).view(torch.float8_e4m3fn)
            stored[f"{stack}_scale_inv"] = torch.stack([own["weight_scale_inv"] for own, _ in made])
            weights[stack] = torch.stack([own for _, own in made])
    save_file(stored, path / MODEL)
    save_file(weights, plain / MODEL)
    with open_checkpoint(path) as found, open_checkpoint(plain) as expected:
        found.validate()
        for expert in range(5):
            own, wanted = (c.neuron_rows("1.ffn", expert, 3, 31) for c in (found, expected))
            assert all(a is not None and same(a, b) for a, b in zip(own, wanted, strict=True))


@pytest.mark.parametrize("name", ["fp8", "gptq", "int4", "float-channel"])
def test_a_config_that_says_nothing_is_named(name: str, tmp_path: Path) -> None:
    path, _ = quantized_checkpoint(FORMATS[name], tmp_path, num_hidden_layers=1, **FORMATS[name].extra)
    configure(path, None)
    with pytest.raises(CheckpointError, match=r"of a quantized checkpoint, and config.json has no quant"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "int4", "mxfp4"])
def test_plain_weights_that_are_said_to_be_quantized_are_refused(name: str, tmp_path: Path) -> None:
    _, plain = quantized_checkpoint(FORMATS[name], tmp_path, num_hidden_layers=1, **FORMATS[name].extra)
    configure(plain, FORMATS[name].config)
    with pytest.raises(CheckpointError, match=r"says that weights are quantized by .*, and no tensor is stored so"):
        open_checkpoint(plain)


@pytest.mark.parametrize("inside", [False, True])
def test_a_text_model_inside_another(inside: bool, tmp_path: Path) -> None:
    """The configuration of either may say how weights are quantized; those that see are not read."""
    path, plain = quantized_checkpoint(FORMATS["fp8"], tmp_path, num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    wrapper: dict[str, Any] = {"model_type": "llava", "text_config": config, "tie_word_embeddings": False}
    (config if inside else wrapper)["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(wrapper))
    stored = {f"language_model.{name}": tensor for name, tensor in load_file(path / MODEL).items()}
    stored["vision_tower.blocks.0.proj.weight"] = torch.ones(3, 3)
    save_file(stored, path / MODEL)
    with open_checkpoint(path) as found, open_checkpoint(plain) as expected:
        found.validate()
        assert same(found.matrix_rows("0.qkv", 3, 99), expected.matrix_rows("0.qkv", 3, 99))


STRANGE = (None, -1, 0, 3, 7.5, 1 << 40, "x", "4", [], [1], ["("], {}, {"a": 1}, True)


def variations(value: Any) -> Iterator[Any]:
    """A configuration with each of its fields left out, or something else in its place, however deep it lies."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield {k: v for k, v in value.items() if k != key}
            for other in (*STRANGE, *variations(own)):
                yield {**value, key: other}


@pytest.mark.parametrize("name", ["fp8", "int4-zeros", "bytes", "gptq-odd", "awq", "mxfp4", "float-block", "nvfp4"])
def test_a_strange_configuration_is_refused_or_means_the_same(name: str, tmp_path: Path) -> None:
    """What a field says is read, or changes no weight, or is refused."""
    path, plain = quantized_checkpoint(FORMATS[name], tmp_path, num_hidden_layers=1, **FORMATS[name].extra)
    with open_checkpoint(plain) as source:
        expected = source.matrix_rows("0.qkv", 3, 60)
    refused = 0
    for config in variations(FORMATS[name].config):
        configure(path, config)
        try:
            with open_checkpoint(path) as found:
                found.validate()
                assert same(found.matrix_rows("0.qkv", 3, 60), expected), config
        except (CheckpointError, UnsupportedModelError):
            refused += 1
    assert refused > 20
