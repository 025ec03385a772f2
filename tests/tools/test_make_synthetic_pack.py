"""Synthetic packs are packs: readable, verified, with weights of the size that activations need."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flashrt.arch import family_of
from flashrt.spec import LatentAttention
from flashrt.storage.pack import Pack
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels import ops
from flashrt_kernels.rows import DTYPES, Codec, row_bytes
from tests.engine.support import logits_of, tiny_engine
from tools.make_synthetic_pack import PRESETS, make

ROOT = Path(__file__).parents[2]
ODD = replace(PRESETS["tiny"], hidden=100, layers=2, neurons=333, experts=3, experts_per_token=2, vocab=259)


@pytest.mark.parametrize("codec", DTYPES)
def test_a_pack_of_random_weights_is_a_pack(tmp_path: Path, codec: Codec) -> None:
    make(tmp_path / "p", "odd", ODD, codec)
    pack = Pack(tmp_path / "p")
    pack.verify()
    assert pack.spec == ODD.spec()
    tensor = pack.layout.tensors["0.ffn"]
    raw = np.fromfile(pack.path / tensor.file, np.uint8, tensor.run_bundles * tensor.stride, offset=tensor.offset)
    bundles = raw.reshape(tensor.run_bundles, tensor.stride)
    size = row_bytes(codec, ODD.hidden)
    for part, inputs in enumerate((ODD.hidden, ODD.hidden, ODD.neurons)):
        rows = np.ascontiguousarray(bundles[:, part * size : (part + 1) * size])
        weights = np.full((len(rows), ODD.hidden), np.nan, np.float32)
        ops.load("cpu").dequantize(rows, codec, ODD.hidden, weights)
        assert weights.std() == pytest.approx(inputs**-0.5, rel=0.05)
        assert len(np.unique(weights, axis=0)) > 100


def test_the_same_seed_gives_the_same_pack(tmp_path: Path) -> None:
    hashes = {make(tmp_path / str(i), "odd", ODD, Codec.INT4, seed).hash for i, seed in enumerate((1, 1, 2))}
    assert len(hashes) == 2


def test_a_skewed_router_has_favourites(tmp_path: Path) -> None:
    shape = replace(ODD, experts=11)
    make(tmp_path / "p", "odd", shape, Codec.INT4, router_skew=0.7)
    pack = Pack(tmp_path / "p")
    pack.verify()
    orders = []
    for layer in range(shape.layers):
        tensor = pack.layout.tensors[f"{layer}.router"]
        raw = np.fromfile(pack.path / tensor.file, np.uint8, tensor.bundles * tensor.stride, offset=tensor.offset)
        size = row_bytes(tensor.codec, shape.hidden)
        rows = raw.reshape(tensor.bundles, tensor.stride)[:, : 8 * size].reshape(-1, size)[: shape.experts]
        weights = np.full((shape.experts, shape.hidden), np.nan, np.float32)
        ops.load("cpu").dequantize(np.ascontiguousarray(rows), tensor.codec, shape.hidden, weights)
        lengths = np.linalg.norm(weights, axis=1)
        orders.append(np.argsort(-lengths).tolist())
        assert -np.sort(-lengths) == pytest.approx(np.arange(1, 12) ** -0.7, rel=0.3)
    assert orders[0] != orders[1]


def test_the_tokenizer_takes_any_text(tmp_path: Path) -> None:
    make(tmp_path / "p", "tiny", PRESETS["tiny"], Codec.INT8)
    tokenizer = Tokenizer.from_files(tmp_path / "p")
    text = "naïve façade: 日本語 🙂\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("preset", "weights"), [("llama-2-70b", 68_976_648_192), ("llama-3-8b", 8_030_261_248)])
def test_a_preset_holds_what_the_model_holds(preset: str, weights: int) -> None:
    spec = PRESETS[preset].spec()
    assert spec.parameters + sum(spec.vectors().values()) == weights


@pytest.mark.parametrize(
    ("preset", "kind", "fields"),
    [
        ("deepseek-v3", "DeepseekV3", {"max_position_embeddings": 163840}),
        ("glm-4.7-flash", "Glm4MoeLite", {}),
    ],
)
def test_latent_presets_are_the_defaults_of_transformers(preset: str, kind: str, fields: dict[str, int]) -> None:
    config = getattr(transformers, f"{kind}Config")(**fields)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    corrections = sum(buffer.numel() for name, buffer in model.named_buffers() if "correction" in name)
    spec = PRESETS[preset].spec()
    assert spec.parameters + sum(spec.vectors().values()) == model.num_parameters() + corrections
    assert spec.unsupported() is None
    latent = spec.layers[0].mixer
    assert isinstance(latent, LatentAttention)
    read = family_of(config.model_type).spec(config.to_dict()).layers[0].mixer
    assert latent == replace(read, rope=replace(read.rope, theta=latent.rope.theta))
    assert spec.context == config.max_position_embeddings


def test_a_latent_model_is_one_that_runs(tmp_path: Path) -> None:
    shape = replace(PRESETS["deepseek-v3"], hidden=64, layers=3, heads=4, head_dim=30, latent=24, query_rank=20)
    shape = replace(shape, nope_dim=8, value_dim=16, neurons=24, shared=24, dense=1, dense_neurons=96, vocab=259)
    make(tmp_path / "p", "latent", replace(shape, context=300, experts=16, experts_per_token=3), Codec.INT8)
    with tiny_engine(Pack(tmp_path / "p"), 0.5) as engine:
        logits = logits_of(engine, list(range(3, 40)), [7, 8])
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "make_synthetic_pack.py"), str(tmp_path / "p"), "--layers", "1"]
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert json.loads(done.stdout)["bytes"] == Pack(tmp_path / "p").layout.nbytes
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 1
    assert "already holds a finished pack" in again.stderr
    assert "Traceback" not in again.stderr


def test_without_the_compiled_kernels(tmp_path: Path) -> None:
    """On a machine with a GPU and nothing built, torch encodes."""
    program = (
        "import sys; sys.modules['flashrt_kernels.cpu'] = None; from pathlib import Path; "
        "from tools.make_synthetic_pack import *; make(Path(sys.argv[1]), 'tiny', PRESETS['tiny'], Codec.INT8)"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "p")], env=env, check=True)
    Pack(tmp_path / "p").verify()


@pytest.mark.parametrize("experts", [0, 5])
def test_a_hybrid_is_one_that_runs(tmp_path: Path, experts: int) -> None:
    shape = replace(PRESETS["qwen3.5-35b-a3b" if experts else "qwen3.5-4b"], hidden=64, layers=5, heads=4, head_dim=16)
    shape = replace(shape, neurons=96, vocab=259, context=300, experts=experts, shared=24 if experts else 0)
    shape = replace(shape, experts_per_token=2 if experts else 0, delta_heads=4, delta_keys=2, delta_dim=8)
    make(tmp_path / "p", "hybrid", shape, Codec.INT8)
    pack = Pack(tmp_path / "p")
    assert list(pack.spec.attentions) == [3]
    with tiny_engine(pack, 0.5) as engine:
        logits = logits_of(engine, list(range(3, 40)), [7, 8])
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1
