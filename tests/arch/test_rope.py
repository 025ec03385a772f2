"""Rotary frequencies are those of transformers at exactly the planned length, and scaling raises the context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashrt.arch import family_of
from flashrt.arch.gguf import gguf_config
from flashrt.engine.options import LoadOptions
from flashrt.errors import CheckpointError, UnsupportedModelError, UsageError
from flashrt.rope import Rope, RopeScaling, parse_rope_scaling
from flashrt.spec import ModelSpec
from flashrt.storage.sources.gguf_header import read_gguf_header
from tests.families import VOCAB, tiny_checkpoint, tiny_gguf

TRAINED = 37
SHORT = [1.0 + 0.13 * i for i in range(10)]
LONG = [1.5 + 0.71 * i for i in range(10)]
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "longrope": {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": TRAINED},
}


def fields(kind: str, **more: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 1000.0, **KINDS[kind], **more}
    most = TRAINED if kind in ("dynamic", "yarn") else 91
    return {"rope_parameters": parameters, "max_position_embeddings": most}


def spec_of(**config: Any) -> ModelSpec:
    common = {"vocab_size": VOCAB, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2}
    return family_of("llama").spec({**common, "num_attention_heads": 6, "head_dim": 20, **config})


def rope_of(spec: ModelSpec) -> Rope:
    rope = spec.layers[0].attention.rope
    assert rope is not None
    return rope


@pytest.mark.parametrize(("share", "factor", "head_dim"), [(0.25, 1.0, 512), (0.28, 3.0, 36), (1.0, 2.0, 20)])
def test_frequencies_of_heads_rotated_in_part_are_transformers(share: float, factor: float, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "proportional",
        "rope_theta": 5000.0,
        "partial_rotary_factor": share,
        "factor": factor,
    }
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters)
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](config)
    rope = rope_of(spec_of(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=64))
    np.testing.assert_allclose(rope.inverse_frequencies(head_dim), expected.numpy(), rtol=1e-5)
    assert Rope.from_json(rope.to_json()) == rope


def test_heads_rotated_in_part_are_not_scaled() -> None:
    parameters = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    spec = spec_of(rope_parameters=parameters, max_position_embeddings=64)
    with pytest.raises(UsageError, match=r"rotates a share of the pairs.*leave --rope-scaling out"):
        spec.scaled(parse_rope_scaling("yarn:4"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [11, TRAINED, TRAINED + 1, 83])
def test_a_prompt_of_the_planned_length_gives_transformers_logits(kind: str, length: int, tmp_path: Path) -> None:
    import flashrt

    model, directory = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3, **fields(kind))
    ids = np.random.default_rng(7).integers(3, VOCAB, length)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()
    options: dict[str, Any] = {"dtype": "f32", "threads": 1, "cache_dir": tmp_path / "cache", "speculate": "off"}
    with flashrt.load(directory, context=length, **options) as engine:
        found = np.array(engine.runner.prefill(engine.sequence, ids.tolist())).reshape(-1)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "expected"),
    [({}, 91), ({"attention_factor": 1.7}, 91), ({"factor": 6.0}, 91), ({"factor": 0.5}, 91)],
)
def test_longrope_attention_factor(change: dict[str, Any], expected: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = fields("longrope", **change)
    spec = spec_of(**config)
    theirs = LlamaConfig(hidden_size=72, num_attention_heads=6, head_dim=20, **config)
    for length in (TRAINED, TRAINED + 1):
        frequencies, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
        np.testing.assert_allclose(rope_of(spec).inverse_frequencies(20, length), frequencies.numpy(), rtol=2e-6)
        assert rope_of(spec).attention_factor == pytest.approx(factor, rel=1e-12)
    assert spec.context == expected


def test_the_original_context_beside_the_parameters() -> None:
    config = fields("longrope")
    del config["rope_parameters"]["original_max_position_embeddings"]
    rope = rope_of(spec_of(original_max_position_embeddings=TRAINED, **config))
    assert rope == rope_of(spec_of(**fields("longrope")))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"short_factor": SHORT[:9]}, "9 short_factors, expected 10"),
        ({"long_factor": [*LONG, 1.0]}, "11 long_factors, expected 10"),
        ({"long_factor": [*LONG[:9], 0.0]}, "not positive"),
        ({"long_factor": [*LONG[:9], "1"]}, "long_factor is '1'"),
        ({"long_factor": 3}, "expected a list of numbers"),
        ({"factor": 1e30}, "rope factor is 1e\\+30"),
    ],
)
def test_longrope_that_makes_no_sense_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        spec_of(**fields("longrope", **change))


@pytest.mark.parametrize(("kind", "context"), [("yarn", 148), ("dynamic", 92), ("linear", 91), ("llama3", 91)])
def test_the_context_that_a_config_reaches(kind: str, context: int) -> None:
    assert spec_of(**fields(kind)).context == context


def test_a_context_beyond_all_bounds_is_refused() -> None:
    scaling = {"rope_type": "yarn", "factor": 4096.0}
    with pytest.raises(CheckpointError, match="rope scaling reaches"):
        spec_of(max_position_embeddings=1 << 30, rope_parameters=scaling)


@pytest.mark.parametrize("kind", KINDS)
def test_specs_survive_json_and_old_ones_gain_no_field(kind: str) -> None:
    spec = spec_of(**fields(kind))
    written = spec.to_json()
    assert ModelSpec.from_json(written) == spec
    names = written["layers"][0]["layer"]["attention"]["rope"]
    assert ("long_factors" in names, "short_factors" in names) == (kind == "longrope",) * 2


@pytest.mark.parametrize("position", [1, (1 << 20) - 1, (1 << 24) + 1])
def test_angles_of_far_positions_are_exact(position: int) -> None:
    frequencies = np.asarray(Rope(1e4).inverse_frequencies(20))
    exact = np.longdouble(1e4) ** (-np.arange(10, dtype=np.longdouble) / 10) * position
    found = np.cos(np.float64(position) * frequencies)
    assert np.abs(found - np.cos(exact)).max() < 1e-7


# --- what a user asks for ---


@pytest.mark.parametrize(
    "value", ["", "yarn", "yarn:", "yarn:1", "yarn:nan", "yarn:1e9", "llama3:8", "linear:x", 4, "longrope:2"]
)
def test_a_wrong_scaling_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="--rope-scaling is .*, expected linear, dynamic or yarn"):
        LoadOptions(rope_scaling=value)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_what_a_user_asks_equals_what_a_config_says(kind: str) -> None:
    plain = spec_of(max_position_embeddings=TRAINED, rope_theta=1000.0)
    scaled = plain.scaled(parse_rope_scaling(f"{kind}:3.5"))
    parameters = {"rope_type": kind, "rope_theta": 1000.0, "factor": 3.5}
    assert rope_of(scaled) == rope_of(spec_of(max_position_embeddings=TRAINED, rope_parameters=parameters))
    assert scaled.context == int(3.5 * TRAINED)


def test_scaling_replaces_the_models_own_from_its_original_context() -> None:
    scaled = spec_of(**fields("yarn")).scaled(RopeScaling("dynamic", 6.0))
    assert (rope_of(scaled).kind, scaled.context) == ("dynamic", 6 * TRAINED)
    with pytest.raises(UsageError, match="own scaling is linear"):
        spec_of(**fields("linear")).scaled(RopeScaling("yarn", 2.0))


# --- GGUF ---


def gguf(tmp_path: Path, change: Callable[[dict[str, Any]], None], factors: dict[str, list[float]]) -> ModelSpec:
    header = read_gguf_header(tiny_gguf("llama", tmp_path / "x.gguf")[1])
    metadata = dict(header.metadata)
    change(metadata)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    return family_of("llama").spec(gguf_config(metadata, shapes.get, factors))


LONGROPE = {"type": "longrope", "original_context_length": TRAINED, "attn_factor": 1.25}
FACTORS = {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG}


def scaling(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda metadata: metadata.update({f"llama.rope.scaling.{name}": value for name, value in values.items()})


def test_gguf_longrope(tmp_path: Path) -> None:
    rope = rope_of(gguf(tmp_path, scaling(**LONGROPE), FACTORS))
    assert (rope.kind, rope.original_context, rope.attention_factor) == ("longrope", TRAINED, 1.25)
    assert (rope.short_factors, rope.long_factors) == (tuple(SHORT), tuple(LONG))


@pytest.mark.parametrize(
    ("values", "factors", "reason"),
    [
        (LONGROPE, {}, "has no rope_factors_short"),
        (LONGROPE | {"factor": 2.0}, FACTORS, "factor=2.0 beside longrope"),
        ({}, FACTORS, "rope_factors_short.weight and rope scaling 'none'"),
        (LONGROPE, FACTORS | {"rope_factors_long.weight": LONG[:9]}, "9 numbers in rope_factors_long"),
        ({"type": "dynamic"}, {}, "rope scaling 'dynamic'"),
        ({"type": "yarn", "factor": 2.0, "yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({"type": "yarn", "factor": 2.0, "yarn_attn_factor": 0.5}, {}, "yarn_attn_factor"),
        ({"alpha": 1000.0}, {}, "scaling.alpha"),
    ],
)
def test_gguf_scaling_that_is_not_computed_is_named(
    values: dict[str, Any], factors: dict[str, list[float]], reason: str, tmp_path: Path
) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=reason):
        gguf(tmp_path, scaling(**values), factors)
