"""Tiny checkpoints in the quantized formats of Hugging Face, each beside the plain checkpoint of the same weights.

Codes and scales are random, so that every code occurs. What a format means is written here a second time, with torch
and from the formats' definitions.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.families import tiny_checkpoint

Tensors = dict[str, torch.Tensor]
MODEL = "model.safetensors"
BLOCKS = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 16, "num_key_value_heads": 2}  # rows of whole blocks


@dataclass(frozen=True)
class Format:
    """config: the quantization_config; encode: random tensors of a weight's shape, by the ends of their names, and the
    float32 weights that they mean; `kept`: the GGUF format that holds these bit for bit, where their shape allows it.
    """

    config: dict[str, Any]
    encode: Callable[[torch.Size, torch.Generator], tuple[Tensors, torch.Tensor]]
    kept: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and ("_proj" in name or "experts" in name)


def quantized_checkpoint(
    own: Format, root: Path, family: str = "llama", *, only: Callable[[str], bool] = is_linear, **shape: Any
) -> tuple[Path, Path]:
    """(a checkpoint whose linear weights are quantized, the plain one that it means)."""
    plain = tiny_checkpoint(family, root / "plain", seed=4, **shape)[1]
    tensors = load_file(plain / MODEL)
    stored: Tensors = {}
    generator = torch.Generator().manual_seed(9)
    for name, values in tensors.items():
        if only(name):
            made, tensors[name] = own.encode(values.shape, generator)
            stored |= {f"{name.removesuffix('.weight')}.{leaf}": tensor for leaf, tensor in made.items()}
        else:
            stored[name] = values
    save_file({k: v.contiguous() for k, v in tensors.items()}, plain / MODEL)
    path = Path(shutil.copytree(plain, root / "quantized"))
    save_file({k: v.contiguous() for k, v in stored.items()}, path / MODEL)
    configure(path, own.config)
    return path, plain


def configure(path: Path, quantization: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@contextlib.contextmanager
def changed(path: Path, tensors: Mapping[str, torch.Tensor | None]) -> Iterator[None]:
    """A checkpoint with other tensors for a while; None takes one away."""
    before = (path / MODEL).read_bytes()
    stored = {**load_file(path / MODEL), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path / MODEL)
    try:
        yield
    finally:
        (path / MODEL).write_bytes(before)


def uniform(shape: Any, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


# --- floats with scales ---


def random_fp8(shape: Any, generator: torch.Generator) -> torch.Tensor:
    """Every finite code: 0x7f and 0xff are not numbers."""
    codes = torch.randint(0, 254, shape, generator=generator)
    return (codes + (codes >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)


def fp8_blocks(height: int, width: int, leaf: str, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    def encode(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, columns = shape
        codes = random_fp8(shape, generator)
        scales = uniform((-(-rows // height), -(-columns // width)), 2e-4, 2e-3, generator)
        if dtype == torch.float8_e8m0fnu:
            scales = torch.randint(114, 119, scales.shape, generator=generator).to(torch.uint8).view(dtype)
        scales = scales.to(dtype)
        wide = scales.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        return {"weight": codes, leaf: scales}, codes.float() * wide

    return encode


def fp8_whole(leaf: str, shape_of_scale: tuple[int, ...] = (), *others: str) -> Callable[..., Any]:
    def encode(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes, scale = random_fp8(shape, generator), uniform(shape_of_scale, 2e-4, 2e-3, generator)
        made = {"weight": codes, leaf: scale, **{other: torch.tensor(0.5) for other in others}}
        return made, codes.float() * scale

    return encode


def fp8_rows(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes, scales = random_fp8(shape, generator), uniform((shape[0], 1), 2e-4, 2e-3, generator).bfloat16()
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


# --- codes of four bits ---

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fours(codes: torch.Tensor) -> torch.Tensor:
    """What codes of FP4 mean: sign, two bits of exponent, one of mantissa."""
    return torch.where(codes < 8, 1.0, -1.0) * E2M1[codes % 8]


def pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes of four bits in bytes, the first of two in the low half."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def mxfp4(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes = torch.randint(0, 16, shape, generator=generator)
    scales = torch.randint(119, 124, (shape[0], shape[1] // 32), generator=generator)
    weights = fours(codes) * torch.exp2(scales.float() - 127).repeat_interleave(32, 1)
    return {"weight_packed": pairs(codes), "weight_scale": scales.to(torch.uint8)}, weights


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"dynamic": False, "observer": "minmax", **weights},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "version": "0.20.0",
    }


def _float(strategy: str, **weights: Any) -> dict[str, Any]:
    return compressed("float-quantized", num_bits=8, type="float", symmetric=True, strategy=strategy, **weights)


FORMATS = {
    "fp8": Format(
        {**_FP8, "weight_block_size": [24, 56], "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gat"]},
        fp8_blocks(24, 56, "weight_scale_inv"),
    ),
    "fp8-large-blocks": Format(_FP8, fp8_blocks(128, 128, "weight_scale_inv", torch.bfloat16)),
    "fp8-powers": Format(
        {**_FP8, "weight_block_size": [32, 64], "scale_fmt": "ue8m0"},
        fp8_blocks(32, 64, "weight_scale_inv", torch.float8_e8m0fnu),
    ),
    "fp8-whole": Format(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        fp8_whole("weight_scale_inv", (), "activation_scale"),
    ),
    "fp8-auto": Format(
        {"quant_method": "fp8", "activation_scheme": "static"}, fp8_whole("weight_scale", (1,), "input_scale")
    ),
    "float-tensor": Format(_float("tensor"), fp8_whole("weight_scale", (1,), "input_scale")),
    "float-channel": Format(_float("channel"), fp8_rows),
    "mxfp4": Format(
        compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        mxfp4,
        "MXFP4",
        BLOCKS,
    ),
    "float-block": Format(_float("block", block_structure=[40, 48]), fp8_blocks(40, 48, "weight_scale")),
}
