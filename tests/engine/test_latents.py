"""Latent attention: what a plan says of it, weights of files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from flashrt import load
from flashrt.budget.plan import FixedCosts, Workload
from flashrt.budget.planner import GIB, plan
from flashrt.calibration.kv_pipeline import labelled_layers
from flashrt.calibration.methods import method_for
from flashrt.cli.inspect import _facts, _print
from flashrt.errors import PackError, UnsupportedModelError, UsageError
from flashrt.rope import parse_rope_scaling
from flashrt.storage.layout import pack_layout
from flashrt.storage.pack import Pack
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, relative_rms, tiny_engine
from tests.families import VOCAB, tiny_checkpoint, tiny_gguf
from tests.kept import keep
from tests.quantized import FORMATS, quantized_checkpoint
from tools.make_synthetic_pack import PRESETS

PROMPT = np.random.default_rng(5).integers(3, VOCAB, 60).tolist()
PLAIN = {"rope_type": "default", "rope_theta": 1000.0}
BLOCKS = {  # sizes that are whole blocks
    "hidden_size": 64,
    "intermediate_size": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    root = tmp_path_factory.mktemp("latent")
    return make_pack(tiny_checkpoint("deepseek_v3", root / "checkpoint", 3)[1], root / "pack", Codec.INT8)


@pytest.mark.parametrize(("codec", "key"), [(KvCodec.BF16, 2 * 576), (KvCodec.INT8, 576 * 34 // 32)])
def test_a_plan_of_deepseek_v3_keeps_576_numbers_of_a_token(codec: KvCodec, key: int) -> None:
    spec = PRESETS["deepseek-v3"].spec()
    assert spec.kv_bytes_per_token(codec) == 61 * key
    found = plan(spec, pack_layout(spec, Codec.INT4), 64 * GIB, Workload(65536, prompt=512), costs(codec))
    assert found.owners["KV"] == 61 * key * 65536


def test_older_latents_lie_on_disk_where_memory_is_short() -> None:
    spec = PRESETS["glm-4.7-flash"].spec()
    workload = Workload(spec.context, prompt=512)
    found = plan(spec, pack_layout(spec, Codec.INT4), 6 * GIB, workload, costs(KvCodec.BF16))
    assert found.far is not None
    assert found.far.page_bytes[0] == 256 * 576 * 2


def costs(codec: KvCodec) -> FixedCosts:
    cpu = ops.load("cpu")
    return FixedCosts(90 << 20, 90 << 20, codec, lambda tokens, _: cpu.attention_scratch_bytes(tokens, 128, 1, 576))


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_both_forms_of_a_gguf_file_are_one_model(tmp_path: Path, quant: str) -> None:
    """kv_b whole, and k_b and v_b apart; of blocks both keep v_b, whose rows are the same."""
    shape = {**BLOCKS, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope_parameters": PLAIN}
    families = "deepseek_v3", "deepseek_v3-lite"
    paths = [tiny_gguf(family, tmp_path / f"{family}.gguf", 3, quant, **shape) for family in families]
    with open_checkpoint(paths[0][1]) as apart, open_checkpoint(paths[1][1]) as whole:
        apart.validate()
        whole.validate()
        assert apart.spec == whole.spec
        for i in range(3):
            for key, (rows, _) in apart.spec.layer_matrices(i).items():
                own, other = (each.matrix_rows(key, 3, rows - 2) for each in (apart, whole))
                tolerance = 0.02 if quant == "Q8_0" and key.endswith("k_b") else 0  # blocks go along other rows
                assert np.allclose(own, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v3-lite"])
def test_weights_of_a_file_are_kept(tmp_path: Path, family: str) -> None:
    path = tiny_gguf(family, tmp_path / "x.gguf", 3, "Q8_0", **BLOCKS)[1]
    kept, exact = keep(path, tmp_path / "kept"), make_pack(path, tmp_path / "float", Codec.F32)
    assert kept.manifest.kept is not None
    split = family == "deepseek_v3"
    assert {"0.kv_a", "0.v_b", "0.out", "2.v_b"} <= set(kept.manifest.kept.matrices)
    assert ("0.k_b" in kept.manifest.kept.matrices) == split
    assert kept.manifest.kept.requantized.get("0.k_b") == (None if split else "Q8_0 by column")
    results = []
    for own, share in ((exact, 1.0), (kept, 0.3), (kept, 1.0)):
        with tiny_engine(own, share, chunk=16) as engine:
            results.append(logits_of(engine, PROMPT[:29], PROMPT[29:45]))
    assert np.array_equal(results[1], results[2])
    errors = [relative_rms(*pair) for pair in zip(results[1], results[0], strict=True)]
    assert np.median(errors) < 0.04  # for some tokens a router near a tie chooses another expert


def test_fp8_in_blocks_is_what_it_means(tmp_path: Path) -> None:
    """kv_b_proj is decoded before it is taken apart."""
    quantized, plain = quantized_checkpoint(FORMATS["fp8"], tmp_path, "deepseek_v3", hidden_size=64)
    with open_checkpoint(quantized) as found, open_checkpoint(plain) as expected:
        found.validate()
        for key in ("0.q_b", "0.kv_a", "1.k_b", "1.v_b", "2.out"):
            rows = expected.spec.layer_matrices(int(key[0]))[key][0]
            assert np.array_equal(found.matrix_rows(key, 5, rows - 1), expected.matrix_rows(key, 5, rows - 1))


def test_layers_that_predict_further_tokens_are_not_read(tmp_path: Path) -> None:
    directory = tiny_checkpoint("deepseek_v3", tmp_path)[1]
    weights = load_file(directory / "model.safetensors")
    further = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in weights.items() if ".layers.2." in k}
    for name in ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.head", "shared_head.norm"):
        further[f"model.layers.3.{name}.weight"] = weights["model.norm.weight"].clone()
    save_file({**weights, **further}, directory / "model.safetensors", {"format": "pt"})
    with open_checkpoint(directory) as checkpoint:
        checkpoint.validate()


def test_what_is_not_built_is_named(packed: Pack) -> None:
    with pytest.raises(UnsupportedModelError, match="latent attention: use --mode exact"):
        method_for(packed, ops.load("cpu"))
    with pytest.raises(UnsupportedModelError, match="latents cannot have labels; use --kv exact"):
        labelled_layers(packed.spec)
    with pytest.raises(UsageError, match="is that of its own rotary embedding"):
        packed.spec.scaled(parse_rope_scaling("yarn:4"))
    with pytest.raises(UsageError, match="--kv sparse: latents of this deepseek_v3 model cannot have labels"):
        load(packed.path, kv="sparse", cache_dir=packed.path / "cache")
    with pytest.raises(UsageError, match="--kv-dtype int4: values of this deepseek_v3 model are parts of its keys"):
        load(packed.path, kv_dtype="int4", cache_dir=packed.path / "cache")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 20}, "without one key of a latent and rotated numbers"),
        ({"kv_heads": 2}, "without one key of a latent and rotated numbers"),
        ({"window": 5}, "with what only other attention has"),
        ({"value_dim": 12}, "values of 12 numbers, kernels take multiples of 8"),
        ({"head_dim": 1006, "rank": 1000}, "keys of 1000 \\+ 6 numbers are wider than the 576"),
        ({"query_rank": -1}, "query_rank is -1"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_a_manifest_with_another_latent_attention_is_refused(packed: Pack, change: dict, reason: str) -> None:
    from flashrt.storage.manifest import Manifest, _checksum

    body = json.loads((packed.path / "manifest.json").read_bytes())
    body.pop("checksum")
    body["spec"]["layers"][0]["layer"]["latent_attention"] |= change
    body["checksum"] = _checksum(body)
    with pytest.raises(PackError, match=reason):
        Manifest.from_bytes(json.dumps(body).encode(), "here")


def test_inspect_says_what_is_kept(packed: Pack, capsys: pytest.CaptureFixture) -> None:
    _print(_facts(packed))
    shown = capsys.readouterr().out
    assert "6 heads over latents of 24 numbers and 6 rotated ones" in shown
    assert "none: latents have none" in shown
