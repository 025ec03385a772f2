"""The layout: every block on page boundaries, every byte of a file in one place, whatever the shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.layout import (
    PAGE,
    RESIDENT_FILE,
    codec_of,
    layer_file,
    pack_layout,
)
from flashrt_kernels.limits import MATRIX_STEP, NEURON_STEP
from flashrt_kernels.rows import DTYPES, MATRIX_ROWS, Codec
from tests.fake_source import DENSE, MOE, SPECS


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    hidden = draw(st.integers(1, 600))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        kv_heads = draw(st.integers(1, 3))
        attention = Attention(kv_heads * draw(st.integers(1, 4)), kv_heads, draw(st.integers(1, 70)), 1.0)
        experts = draw(st.sampled_from([0, 0, 1, 4]))
        ffn = Ffn(
            draw(st.integers(1, 700)),
            "silu",
            gated=draw(st.booleans()),
            experts=experts,
            experts_per_token=min(experts, 1),
        )
        layers.append(Layer(attention, ffn))
    return ModelSpec(
        family="any",
        vocab=draw(st.integers(1, 3000)),
        hidden=hidden,
        layers=tuple(layers),
        context=8,
        tied=draw(st.booleans()),
        positions=draw(st.sampled_from([0, 10])),
    )


@given(specs(), st.sampled_from(DTYPES), st.sampled_from([1, 1 << 12, 100_000, 1 << 20]))
@settings(max_examples=150, deadline=None)
def test_blocks_tile_their_tensor_on_page_boundaries(spec: ModelSpec, codec: Codec, block_bytes: int) -> None:
    layout = pack_layout(spec, codec, block_bytes)
    for tensor in layout.tensors.values():
        end, bundle = tensor.offset, 0
        for index in range(tensor.blocks):
            block = tensor.block(index)
            assert block.offset == end
            assert block.first == bundle
            assert block.offset % PAGE == block.nbytes % PAGE == 0
            assert 0 < block.nbytes == block.bundles * tensor.stride <= tensor.max_block_bytes
            end, bundle = end + block.nbytes, bundle + block.bundles
            run = index // tensor.run_blocks
            assert index in tensor.run_block_range(run)
            assert run * tensor.run_stride <= block.first < bundle <= (run + 1) * tensor.run_stride  # one expert's
            inner_cut = bundle % tensor.run_stride
            assert inner_cut % (MATRIX_STEP if tensor.bundle_rows == MATRIX_ROWS else NEURON_STEP) == 0
        assert end == tensor.offset + tensor.nbytes
        assert bundle == tensor.bundles


@given(specs(), st.sampled_from(DTYPES))
@settings(max_examples=100, deadline=None)
def test_every_byte_of_a_file_has_one_place(spec: ModelSpec, codec: Codec) -> None:
    layout = pack_layout(spec, codec)
    assert list(layout.file_bytes) == [RESIDENT_FILE, *(layer_file(i) for i in range(len(spec.layers)))]
    for file, nbytes in layout.file_bytes.items():
        pieces = [(t.offset, t.nbytes) for t in layout.tensors_of(file)]
        pieces += [(v.offset, 4 * v.length) for v in layout.vectors_of(file)]
        end = pieces[0][0]
        assert end % PAGE == 0
        for offset, size in pieces:
            assert offset == end
            end += size
        assert end == nbytes
    assert set(layout.vectors) == set(spec.vectors())
    assert layout.nbytes == sum(layout.file_bytes.values())


def test_tensors_come_in_execution_order() -> None:
    names = list(pack_layout(MOE, Codec.INT8).tensors)
    assert names == ["embed", "head", "0.qkv", "0.out", "0.ffn", "1.qkv", "1.out", "1.router", "1.ffn"]


@pytest.mark.parametrize("codec", DTYPES)
def test_the_router_keeps_more_bits(codec: Codec) -> None:
    assert codec_of("1.router", codec) is (Codec.F32 if codec is Codec.F32 else Codec.BF16)
    assert codec_of("1.qkv", codec) is codec


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_survives_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_equal_layers_are_written_once() -> None:
    spec = ModelSpec("any", 8, 8, (DENSE.layers[0],) * 80, 8)
    runs = spec.to_json()["layers"]
    assert len(runs) == 1
    assert runs[0]["count"] == 80


def test_parameters_of_a_70b() -> None:
    layer = Layer(Attention(64, 8, 128, 128**-0.5), Ffn(28672, "silu"))
    spec = ModelSpec("llama", 32000, 8192, (layer,) * 80, 4096)
    norms = 161 * 8192
    assert spec.parameters + norms == 68_976_648_192  # what the published Llama-2-70B holds
    assert pack_layout(spec, Codec.INT4).nbytes * 8 / spec.parameters < 5
