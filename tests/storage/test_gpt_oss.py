"""gpt-oss as it is published: experts in MXFP4, the rest in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashrt.engine.engine import Engine
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint
from tests.kept import keep

from .test_kept import neurons_of

STACKS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in MXFP4, and one of the same weights, decoded by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    root = tmp_path_factory.mktemp("gpt_oss")
    _, plain = tiny_checkpoint("gpt_oss", root / "plain", seed=3, hidden_size=64, intermediate_size=192)
    _, published = tiny_checkpoint("gpt_oss", root / "published", seed=3, hidden_size=64, intermediate_size=192)
    tensors, generator = load_file(plain / "model.safetensors"), torch.Generator().manual_seed(7)
    decoded, quantized = dict(tensors), dict(tensors)
    for name, values in tensors.items():
        if not name.endswith(STACKS):
            continue
        experts, columns, rows = values.shape  # turned around
        shape = experts, rows, columns // 32
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(119, 123, shape, generator=generator, dtype=torch.uint8)
        decoded[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
        assert decoded[name].shape == values.shape
        del quantized[name]
        quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(decoded, plain / "model.safetensors")
    save_file(quantized, published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    exempt = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": exempt}
    (published / "config.json").write_text(json.dumps(config))
    return published, plain


def logits(engine: Engine) -> np.ndarray:
    random = np.random.default_rng(5)
    return logits_of(engine, random.integers(3, VOCAB, 23).tolist(), random.integers(3, VOCAB, 4).tolist())


def test_the_weights_are_those_that_transformers_decodes(both: tuple[Path, Path], tmp_path: Path) -> None:
    """Files differ by the signs of zeros."""
    packs = [make_pack(path, tmp_path / path.name, Codec.F32) for path in both]
    with tiny_engine(packs[0], 1.0) as found, tiny_engine(packs[1], 1.0) as expected:
        assert np.array_equal(logits(found), logits(expected))


def test_experts_are_kept(both: tuple[Path, Path], tmp_path: Path) -> None:
    """Gate, up and down: all are MXFP4 in the pack, each weight the one that transformers decodes."""
    kept, tensors = keep(both[0], tmp_path / "kept"), load_file(both[1] / "model.safetensors")
    assert kept.manifest.kept is not None
    for layer in range(len(kept.spec.layers)):
        own = kept.manifest.kept.neurons[f"{layer}.ffn"]
        assert {own.gate, own.up, own.down} == {Codec.MXFP4}
        fused, down = (tensors[f"model.layers.{layer}.mlp.experts.{name}"].numpy() for name in STACKS)
        for expert in range(kept.spec.layers[layer].ffn.experts):
            expected = fused[expert].T[::2], fused[expert].T[1::2], down[expert]
            found = neurons_of(kept, kept.layout.tensors[f"{layer}.ffn"], expert)
            assert all(
                np.array_equal(ours[: len(theirs)], theirs) for ours, theirs in zip(found, expected, strict=True)
            )
    with tiny_engine(kept, 0.5) as half, tiny_engine(kept, 1.0) as whole:
        assert np.array_equal(logits(half), logits(whole))
