"""What was packed comes back: through the safetensors library, and through the pack's own reader."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from flashrt.spec import ModelSpec
from flashrt.storage.layout import TensorLayout
from flashrt.storage.pack import Pack
from flashrt_kernels import ops
from flashrt_kernels.rows import DTYPES, MATRIX_ROWS, Codec, align, row_bytes
from tests.conftest import MakePack
from tests.fake_source import SPECS, FakeSource

# The largest error of one weight between -2 and 2: half a step of the code, and what its scale loses.
TOLERANCE = {Codec.F32: 0.0, Codec.BF16: 0.0, Codec.INT8: 0.01, Codec.INT4: 0.2}


def decoded(tensor: TensorLayout, data: np.ndarray) -> np.ndarray:
    """float32 [bundles, bundle_rows, columns] of the packed `data` [bundles, stride]."""
    size = row_bytes(tensor.codec, tensor.columns)
    rows = np.ascontiguousarray(data[:, : tensor.bundle_rows * size]).reshape(-1, size)
    out = np.full((len(rows), tensor.columns), np.nan, np.float32)
    ops.load("cpu").dequantize(rows, tensor.codec, tensor.columns, out)
    return out.reshape(len(data), tensor.bundle_rows, tensor.columns)


def expected(source: FakeSource, tensor: TensorLayout) -> np.ndarray:
    """The weights that `decoded` should give back, zero where there is only padding."""
    spec = source.spec
    result = np.zeros((tensor.bundles, tensor.bundle_rows, tensor.columns), np.float32)
    if tensor.bundle_rows == MATRIX_ROWS:
        shapes = dict(spec.shared_matrices())
        for i in range(len(spec.layers)):
            shapes |= spec.layer_matrices(i)
        rows = shapes[tensor.name][0]
        result.reshape(-1, tensor.columns)[:rows] = source.matrix_rows(tensor.name, 0, rows)
        return result
    for run in range(tensor.runs):
        parts = source.neuron_rows(tensor.name, run, 0, tensor.run_bundles)
        first = run * tensor.run_stride
        stacked = np.stack([p for p in parts if p is not None], 1)
        result[first : first + tensor.run_bundles] = stacked
    return result


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_any_safetensors_reader_gives_the_weights_back(make_pack: MakePack, spec: ModelSpec, codec: Codec) -> None:
    pack = Pack(make_pack(spec, codec))
    source = FakeSource(spec)
    pack.verify()
    for file in pack.layout.file_bytes:
        with safe_open(pack.path / file, "np") as reader:
            tensors = {t.name: t for t in pack.layout.tensors_of(file)}
            vectors = {v.name for v in pack.layout.vectors_of(file)}
            assert set(reader.keys()) == set(tensors) | vectors
            for name, tensor in tensors.items():
                data = reader.get_tensor(name)
                assert data.shape == (tensor.bundles, tensor.stride)
                error = np.abs(decoded(tensor, data) - expected(source, tensor)).max()
                assert error <= (0.0 if name.endswith(".router") else TOLERANCE[tensor.codec])
                used = tensor.bundle_rows * row_bytes(tensor.codec, tensor.columns)
                assert not data[:, used:].any()
            for name in vectors:
                np.testing.assert_array_equal(reader.get_tensor(name), source.vector(name))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_offsets_of_the_layout_are_those_of_the_file(make_pack: MakePack, spec: ModelSpec) -> None:
    pack = Pack(make_pack(spec, Codec.INT8))
    for tensor in pack.layout.tensors.values():
        with safe_open(pack.path / tensor.file, "np") as reader:
            whole = reader.get_tensor(tensor.name).tobytes()
        raw = (pack.path / tensor.file).read_bytes()
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == whole
        for index in range(tensor.blocks):
            block = tensor.block(index)
            assert zlib.crc32(raw[block.offset : block.offset + block.nbytes]) == pack.block_crc(tensor.name, index)


def test_padding_of_columns_is_zero(make_pack: MakePack) -> None:
    pack = Pack(make_pack(SPECS["ungated"], Codec.F32))
    tensor = pack.layout.tensors["0.qkv"]
    raw = (pack.path / tensor.file).read_bytes()
    padded = align(tensor.columns, 64)
    row = np.frombuffer(raw, "<f4", padded, tensor.offset)
    assert not row[tensor.columns :].any()


def test_block_size_changes_no_weight(make_pack: MakePack) -> None:
    """Blocks are a matter of reading: the data files are the same, only the manifest differs."""
    small, large = make_pack(name="a", block_bytes=1), make_pack(name="b", block_bytes=1 << 20)
    for file in Pack(small).layout.file_bytes:
        assert (small / file).read_bytes() == (large / file).read_bytes()


def test_text_files_are_kept_and_checked(make_pack: MakePack) -> None:
    pack = Pack(make_pack())
    pack.check_text("tokenizer.json")
    assert sorted(p.name for p in Path(pack.path).iterdir()) == sorted(
        [*pack.layout.file_bytes, "manifest.json", "tokenizer.json", "text.json"]
    )
