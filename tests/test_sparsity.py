"""What a manifest says about sparse mode: read back as it was written, refused where it makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from flashrt.sparsity import ChannelSparsity, RowSparsity, Sparsity, gives_zeros
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.layout import pack_layout
from flashrt_kernels.rows import DTYPES, Codec

ROWS = RowSparsity(64, 1.5, (40.0, 12.5, 0.5, 0.0))
CHANNELS = ChannelSparsity(20, 0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("method", "layer"), [("rows", ROWS), ("rows", replace(ROWS, heads_from=-0.5)), ("channels", CHANNELS)]
)
def test_round_trip(method: str, layer: Any) -> None:
    sparsity = Sparsity("base", 0.02, 0.01, (layer, layer), {"tokens": 5})
    data = json.loads(json.dumps(sparsity.to_json()))
    assert data["method"] == sparsity.method == method
    assert Sparsity.from_json(data) == sparsity


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"rank": 1 << 20},
        {"rank": True},
        {"threshold": float("nan")},
        {"threshold": "1"},
        {"heads_from": float("inf")},
        {"heads_from": True},
        {"misses": []},
        {"misses": [1.0]},
        {"misses": [1.0, 2.0, 0.0]},
        {"misses": [1.0, 0.5]},
        {"misses": [float("inf"), 0.0]},
        {"misses": [1.0] * 80 + [0.0]},
        {"other": 1},
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    data = Sparsity("base", 0.02, 0.01, (ROWS,)).to_json()
    data["layers"][0] |= changes
    with pytest.raises((ValueError, TypeError)):
        Sparsity.from_json(data)


@pytest.mark.parametrize("method", ["channels", "columns"])
def test_another_method_is_refused(method: str) -> None:
    data = Sparsity("base", 0.02, 0.01, (ROWS,)).to_json()
    with pytest.raises((KeyError, TypeError)):
        Sparsity.from_json(data | {"method": method})


def test_misses_are_interpolated() -> None:
    assert [ROWS.missed(share) for share in (-1, 0, 1 / 6, 1 / 3, 1, 2)] == pytest.approx([40, 40, 26.25, 12.5, 0, 0])


def test_activations_that_give_zeros() -> None:
    assert all(map(gives_zeros, ("relu", "relu2", "fatrelu:0.01")))
    assert not any(map(gives_zeros, ("silu", "gelu", "gelu_tanh")))


@pytest.mark.parametrize("codec", DTYPES)
def test_layout_by_row(codec: Codec) -> None:
    """The predictor lies in front of its block, in int4 whatever the pack has; nothing else changes."""
    layer = Layer(Attention(2, 2, 20, 0.2), Ffn(300, "relu", gated=False, bias=True))
    spec = ModelSpec("opt", 100, 40, (layer,) * 2, 64, norm="layer", positions=66, position_offset=2)
    exact = pack_layout(spec, codec)
    found = pack_layout(spec, codec, sparsity=Sparsity("base", 0.02, 0.01, (ROWS, replace(ROWS, rank=13))))
    names = [name for name in found.tensors if name.startswith("1.")]
    assert names == ["1.qkv", "1.out", "1.predictor.down", "1.predictor.up", "1.ffn"]
    assert found.tensors["1.predictor.down"].columns == 40
    assert found.tensors["1.predictor.up"].columns == 13
    assert found.tensors["1.predictor.up"].codec is Codec.INT4
    assert found.vectors["1.predictor.bias"].length == 300
    heads = pack_layout(spec, codec, sparsity=Sparsity("base", 0.02, 0.01, (ROWS, replace(ROWS, heads_from=0.5))))
    assert set(heads.tensors) - set(found.tensors) == {"1.predictor.heads"}
    assert heads.tensors["1.predictor.heads"].run_bundles == 1
    assert heads.tensors["1.predictor.heads"].columns == 40
    assert heads.tensors["1.predictor.heads"].codec is Codec.INT4
    assert heads.vectors["1.predictor.heads.bias"].length == 2
    for name, tensor in exact.tensors.items():
        assert replace(found.tensors[name], offset=tensor.offset) == tensor
