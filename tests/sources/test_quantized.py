"""Quantized checkpoints of Hugging Face: what is read of them is what their format means, and the rest is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources import Checkpoint, open_checkpoint, tensors
from tests.quantized import FORMATS, MODEL, Format, changed, configure, fp8_blocks, quantized_checkpoint

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
                        found.neuron_rows(i, expert, start, stop),
                        plain.neuron_rows(i, expert, start, stop),
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
            found = checkpoint.neuron_rows(0, 0, 5, 77)[("gate", "up", "down").index(part)]
            assert same(found, expected[5:77] if part != "down" else expected[:, 5:77].T)
