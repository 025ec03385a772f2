"""Tiny checkpoints in the quantized formats of Hugging Face, each beside the plain checkpoint of the same weights.

Codes and scales are random, so that every code occurs. What a format means is written here a second time, with torch
and from the formats' definitions.
"""

from __future__ import annotations

import contextlib
import json
import re
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
SIXTEENS = {"hidden_size": 96, "intermediate_size": 112, "head_dim": 24}
EIGHTS = {"hidden_size": 72, "intermediate_size": 104}


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
    return name.endswith((".fc1.weight", ".fc2.weight")) or bool(re.search(r"(_proj|experts.*)\.weight$", name))


def quantized_checkpoint(
    own: Format | Callable[[str], Format],
    root: Path,
    family: str = "llama",
    **shape: Any,
) -> tuple[Path, Path]:
    """(a checkpoint whose linear weights are quantized, the plain one that it means); `own` may depend on a name."""
    formed = (lambda _: own) if isinstance(own, Format) else own
    plain = tiny_checkpoint(family, root / "plain", seed=4, **shape)[1]
    tensors = load_file(plain / MODEL)
    stored: Tensors = {}
    generator = torch.Generator().manual_seed(9)
    for name, values in tensors.items():
        if is_linear(name):
            made, tensors[name] = formed(name).encode(values.shape, generator)
            stored |= {f"{name.removesuffix('.weight')}.{leaf}": tensor for leaf, tensor in made.items()}
        else:
            stored[name] = values
    save_file({k: v.contiguous() for k, v in tensors.items()}, plain / MODEL)
    path = Path(shutil.copytree(plain, root / "quantized"))
    save_file({k: v.contiguous() for k, v in stored.items()}, path / MODEL)
    configure(path, formed("").config)
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


def nvfp4(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    codes = torch.randint(0, 16, shape, generator=generator)
    scales = uniform((shape[0], shape[1] // 16), 5, 400, generator).to(torch.float8_e4m3fn)
    whole = uniform((1,), 2000, 9000, generator)
    weights = fours(codes) * spread(scales.float() / whole, shape[1])
    made = {"weight_packed": pairs(codes), "weight_scale": scales, "weight_global_scale": whole}
    return {**made, "input_global_scale": torch.ones(1)}, weights


# --- integers ---


def words(codes: torch.Tensor, bits: int, axis: int = 1) -> torch.Tensor:
    """Codes in words of 32 bits, the first in the lowest, along an axis; the last word may not be full."""
    codes, per = codes.long().movedim(axis, 0), 32 // bits
    codes = torch.cat((codes, torch.zeros(-len(codes) % per, *codes.shape[1:], dtype=torch.int64)))
    packed = sum(codes[i::per] << bits * i for i in range(per))
    assert isinstance(packed, torch.Tensor)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).movedim(0, axis)


def spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """Values of groups [rows, groups] at every column."""
    return values.repeat_interleave(-(-columns // values.shape[1]), 1)[:, :columns]


def scales_of(rows: int, groups: int, bits: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Of weights of about a tenth."""
    return uniform((rows, groups), 0.5, 1.5, generator).mul(0.2 / 2**bits).to(dtype)


def shuffled_groups(columns: int, groups: int, generator: torch.Generator) -> torch.Tensor:
    order = torch.arange(columns) // -(-columns // groups)
    return order[torch.randperm(columns, generator=generator)].to(torch.int32)


def packed(bits: int, group: int | None, dtype: torch.dtype, *, zeros: bool = False, order: bool = False) -> Any:
    """compressed-tensors pack-quantized."""

    def encode(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        (rows, columns), half = shape, 1 << (bits - 1)
        groups = 1 if group is None else columns // group
        codes = torch.randint(-half, half, shape, generator=generator)
        scales = scales_of(rows, groups, bits, dtype, generator)
        made = {
            "weight_packed": words(codes + half, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, columns]),
        }
        shift = torch.zeros(rows, groups, dtype=torch.int64)
        if zeros:
            shift = torch.randint(-half, half, shift.shape, generator=generator)
            made["weight_zero_point"] = words(shift + half, bits, 0)
        index = torch.arange(columns) // -(-columns // groups)
        if order:
            made["weight_g_idx"] = index = shuffled_groups(columns, groups, generator)
        return made, (codes - shift[:, index]).float() * scales.float()[:, index]

    return encode


def signed_bytes(strategy: str, dtype: torch.dtype, *, zeros: bool = False) -> Any:
    """compressed-tensors int-quantized."""

    def encode(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        codes = torch.randint(-128, 128, shape, generator=generator)
        rows = 1 if strategy == "tensor" else shape[0]
        scales = scales_of(rows, 1, 8, dtype, generator)
        made = {"weight": codes.to(torch.int8), "weight_scale": scales[0] if strategy == "tensor" else scales}
        shift = torch.zeros(rows, 1, dtype=torch.int64)
        if zeros:
            shift = torch.randint(-128, 128, shift.shape, generator=generator)
            made["weight_zero_point"] = shift.to(torch.int8)
        return made, (codes - shift).float() * scales.float()

    return encode


def gptq(bits: int, group: int | None, *, sym: bool, order: bool | None = None, version: int = 1) -> Any:
    """order: None for no g_idx, False for one in order."""

    def encode(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, columns = shape
        groups, most = (1 if group is None else -(-columns // group)), 1 << bits
        codes = torch.randint(0, most, shape, generator=generator)
        scales = scales_of(rows, groups, bits, torch.float16, generator)
        shift = torch.full((rows, groups), most // 2)
        if not sym:
            shift = torch.randint(0, most, shift.shape, generator=generator)
        index = torch.arange(columns) // (group or columns)
        zeros = words(shift.T, bits).long()
        if version == 1:  # of each code one less, which a zero borrows from the next
            zeros = (zeros - sum(1 << at for at in range(0, 32, bits)) + (1 << 31)) % (1 << 32) - (1 << 31)
        made = {
            "qweight": words(codes.T, bits, 0),
            "qzeros": zeros.to(torch.int32),
            "scales": scales.T.contiguous(),
        }
        if order is not None:
            index = index[torch.randperm(columns, generator=generator)] if order else index
            made["g_idx"] = index.to(torch.int32)
        return made, (codes - shift[:, index]).float() * scales.float()[:, index]

    return encode


def awq(group: int | None, *, sym: bool = False, dtype: torch.dtype = torch.float16) -> Any:
    def encode(shape: torch.Size, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
        rows, columns = shape
        groups = 1 if group is None else columns // group
        codes, scales = torch.randint(0, 16, shape, generator=generator), scales_of(rows, groups, 4, dtype, generator)
        shift = torch.full((rows, groups), 8) if sym else torch.randint(0, 16, (rows, groups), generator=generator)
        order = torch.arange(rows).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
        made = {
            "qweight": words(codes[order].T, 4),
            "qzeros": words(shift[order].T, 4),
            "scales": scales.T.contiguous(),
        }
        return made, (codes - spread(shift, columns)).float() * spread(scales.float(), columns)

    return encode


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


def _int(form: str, bits: int, group: int | None = None, symmetric: bool = True, **weights: Any) -> dict[str, Any]:
    strategy = "channel" if group is None else "group"
    found = {"strategy": strategy, "group_size": group, "num_bits": bits, "type": "int", "symmetric": symmetric}
    return compressed(form, **{**found, **weights})


def _gptq(bits: int, group: int, **more: Any) -> dict[str, Any]:
    made = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}
    return {**made, "damp_percent": 0.01, "meta": {"quantizer": ["x:1"]}, "lm_head": False}


_AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]}


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
    "nvfp4": Format(
        compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        nvfp4,
        None,
        SIXTEENS,
    ),
    "int4": Format(_int("pack-quantized", 4, 32), packed(4, 32, torch.float16), "Q4_0", BLOCKS),
    "int4-wide": Format(_int("pack-quantized", 4, 96), packed(4, 96, torch.bfloat16), "Q4_0", BLOCKS),
    "int4-rows": Format(_int("pack-quantized", 4), packed(4, None, torch.float32)),
    "int4-half-rows": Format(_int("pack-quantized", 4), packed(4, None, torch.float16), "Q4_0", BLOCKS),
    "int4-zeros": Format(
        _int("pack-quantized", 4, 8, symmetric=False), packed(4, 8, torch.bfloat16, zeros=True), None, EIGHTS
    ),
    "int4-order": Format(
        _int("pack-quantized", 4, 24, actorder="group"), packed(4, 24, torch.float16, order=True), None, BLOCKS
    ),
    "int8": Format(_int("pack-quantized", 8, 32), packed(8, 32, torch.float16), "Q8_0", BLOCKS),
    "int8-zeros": Format(_int("pack-quantized", 8, symmetric=False), packed(8, None, torch.float16, zeros=True)),
    "bytes": Format(_int("int-quantized", 8), signed_bytes("channel", torch.bfloat16), "Q8_0", BLOCKS),
    "bytes-odd": Format(_int("naive-quantized", 8), signed_bytes("channel", torch.float16)),
    "bytes-whole": Format(_int("int-quantized", 8, strategy="tensor"), signed_bytes("tensor", torch.float32)),
    "bytes-zeros": Format(
        _int("int-quantized", 8, symmetric=False), signed_bytes("channel", torch.float32, zeros=True)
    ),
    "gptq": Format(_gptq(4, 32), gptq(4, 32, sym=True, order=False), "Q4_0", BLOCKS),
    "gptq-odd": Format(_gptq(4, 20, sym=False), gptq(4, 20, sym=False)),
    "gptq-order": Format(_gptq(4, 24, desc_act=True), gptq(4, 24, sym=True, order=True), None, BLOCKS),
    "gptq-v2": Format(
        _gptq(4, -1, sym=False, checkpoint_format="gptq_v2"), gptq(4, None, sym=False, version=2), None, BLOCKS
    ),
    "gptq-8": Format(_gptq(8, 96), gptq(8, 96, sym=True), "Q8_0", BLOCKS),
    "gptq-8-zeros": Format(_gptq(8, 40, sym=False), gptq(8, 40, sym=False, order=True)),
    "awq": Format({**_AWQ, "group_size": 24}, awq(24), None, BLOCKS),
    "awq-rows": Format({**_AWQ, "group_size": -1}, awq(None)),
    "awq-middle": Format({**_AWQ, "q_group_size": 96}, awq(96, sym=True), "Q4_0", BLOCKS),
    "float-block": Format(_float("block", block_structure=[40, 48]), fp8_blocks(40, 48, "weight_scale")),
}
