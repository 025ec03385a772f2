"""MXFP4 as gpt-oss stores it, against transformers' own decoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources.quantized.registry import model_tensors
from flashrt.storage.sources.safetensors_header import read_header
from flashrt.storage.sources.tensors import TensorReader
from tests.quantized import fours

NAME = "model.layers.3.mlp.experts.down_proj"
BLOCKS = f"{NAME}_blocks"
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


def stored(shape: tuple[int, int, int], seed: int = 2) -> dict[str, torch.Tensor]:
    """A stack [experts, rows, groups of 32]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{NAME}_blocks": torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8),
        f"{NAME}_scales": torch.randint(0, 253, shape, generator=generator, dtype=torch.uint8),
        f"{NAME}_bias": torch.ones(shape[:2]),
    }


def opened(tensors: dict[str, torch.Tensor], path: Path, config: object = None) -> TensorReader:
    save_file(tensors, path / "m.safetensors")
    return TensorReader(model_tensors(config or CONFIG, read_header(path / "m.safetensors")[0]))


@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (2, 33, 12)])
def test_every_weight_is_that_of_transformers(shape: tuple[int, int, int], tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = stored(shape)
    expected = convert_moe_packed_tensors(
        tensors[f"{NAME}_blocks"], tensors[f"{NAME}_scales"], dtype=torch.float32
    ).numpy()  # [experts, columns, rows]
    reader = opened(tensors, tmp_path)
    experts, rows, columns = reader.tensors[BLOCKS].shape
    assert (experts, rows, columns) == (*shape[:2], 32 * shape[2])
    for expert in range(experts):
        for start, stop in ((0, rows), (rows // 2, rows // 2 + 1)):
            found = reader.rows(BLOCKS, start, stop, expert)
            assert np.array_equal(found, expected[expert][:, start:stop].T)
        for start, stop in ((0, columns), (columns // 2 - 3, columns - 1), (31, 32)):
            assert np.array_equal(reader.columns(BLOCKS, start, stop, expert), expected[expert][start:stop])
    assert reader.tensors[f"{NAME}_bias"].shape == shape[:2]
    reader.close()


def test_rows_are_blocks_of_gguf(tmp_path: Path) -> None:
    import gguf

    tensors = stored((2, 6, 4))
    reader = opened(tensors, tmp_path)
    assert reader.tensors[BLOCKS].dtype == "MXFP4"
    rows = reader.stored_rows(BLOCKS, 1, 5, 1)
    assert rows.shape == (4, 4 * 17)
    found = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.MXFP4)
    codes = tensors[f"{NAME}_blocks"][1, 1:5]
    values = fours(torch.stack((codes & 15, codes >> 4), -1).long().reshape(4, 4, 32))
    exponents = tensors[f"{NAME}_scales"][1, 1:5].int() - 127
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)
    assert np.array_equal(found, (values * scales[..., None]).reshape(4, 128).numpy())
    assert np.array_equal(reader.stored_columns(BLOCKS, 32, 96, 1)[1:5], rows[:, 17:51])
    reader.close()


@pytest.mark.parametrize("end", ["_blocks", "_scales"])
def test_a_missing_half_is_named(end: str, tmp_path: Path) -> None:
    tensors = stored((2, 6, 4))
    del tensors[NAME + end]
    with pytest.raises(CheckpointError, match=f"{NAME}{end} is missing"):
        opened(tensors, tmp_path)


@pytest.mark.parametrize("end", ["_blocks", "_scales"])
def test_other_shapes_and_types_are_named(end: str, tmp_path: Path) -> None:
    for change in (lambda t: t[..., :3], lambda t: t[0, 0], lambda t: t.to(torch.int32)):
        tensors = stored((2, 6, 4))
        tensors[NAME + end] = change(tensors[NAME + end]).contiguous()
        with pytest.raises(CheckpointError, match=rf"{NAME}_(blocks|scales) (has shape|is stored as I32)"):
            opened(tensors, tmp_path)


@pytest.mark.parametrize("exponent", [253, 255])
def test_weights_that_are_not_finite_are_refused(exponent: int, tmp_path: Path) -> None:
    tensors = stored((2, 6, 4))
    tensors[f"{NAME}_scales"][1, 3, 2] = exponent
    reader = opened(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=f"{BLOCKS} holds values that are not finite"):
        reader.rows(BLOCKS, 0, 6, 1)
    reader.close()


def test_what_the_config_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"modules_to_not_convert names it"):
        opened(stored((2, 6, 4)), tmp_path, {**CONFIG, "modules_to_not_convert": ["model.layers.*.mlp"]})
    with pytest.raises(UnsupportedModelError, match="mxfp4 quantization with block=16 is not supported"):
        opened(stored((2, 6, 4)), tmp_path, {**CONFIG, "block": 16})
