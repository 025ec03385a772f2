"""Packs that keep the codecs of a GGUF file: every weight is the file's, and what could not be kept is said."""

from __future__ import annotations

import json
import re

import gguf
import numpy as np
import pytest

from flashrt.errors import CheckpointError, PackError, UsageError
from flashrt.storage.kept import kept_of
from flashrt.storage.kept_rows import KeptEncoder
from flashrt.storage.layout import TensorLayout
from flashrt.storage.manifest import KEPT_VERSION, MANIFEST_FILE, VERSION, _checksum
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels import ops
from flashrt_kernels.rows import KEPT, Codec, row_bytes
from tests.families import tiny_gguf
from tests.kept import BLOCK_BYTES, CASES, Case, keep


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, file, pack that keeps it)."""
    root = tmp_path_factory.mktemp(request.param)
    path = CASES[request.param].write(root / "model.gguf")
    return request.param, path, keep(path, root / "kept")


def raw(packed: Pack, tensor: TensorLayout) -> np.ndarray:
    data = np.fromfile(packed.path / tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
    return data.reshape(tensor.runs, tensor.run_stride, tensor.stride)[:, : tensor.run_bundles]


def decoded(rows: np.ndarray, codec: Codec, k: int) -> np.ndarray:
    size = row_bytes(codec, k)
    rows = np.ascontiguousarray(rows).reshape(-1, size)
    out = np.full((len(rows), k), np.nan, np.float32)
    ops.load("cpu").dequantize(rows, codec, k, out)
    return out


def neurons_of(packed: Pack, tensor: TensorLayout, run: int) -> list[np.ndarray]:
    """Gate, up and down of all neurons of a run, float32 [neurons, hidden] each."""
    bundles, codecs, k, at = raw(packed, tensor)[run], tensor.codecs, tensor.columns, 0
    assert codecs is not None
    found = []
    for codec in (codecs.gate, codecs.up):
        assert codec is not None
        end = at + codecs.group * row_bytes(codec, k)
        found.append(decoded(bundles[:, at:end], codec, k))
        at = end
    if codecs.group == 1:
        found.append(decoded(bundles[:, at : at + row_bytes(codecs.down, k)], codecs.down, k))
    else:
        down = decoded(bundles[:, at : at + k * row_bytes(codecs.down, codecs.group)], codecs.down, codecs.group)
        found.append(down.reshape(len(bundles), k, -1).transpose(0, 2, 1).reshape(-1, k))
    return found


def test_every_weight_is_the_files(case):
    """Whatever is not named as quantized again has the bits that the gguf package decodes."""
    _, path, packed = case
    kept, spec = packed.manifest.kept, packed.spec
    with open_checkpoint(path) as source:
        for name, tensor in packed.layout.tensors.items():
            if name.endswith(".ffn"):
                for run in range(tensor.runs):
                    expected = source.neuron_rows(name, run, 0, spec.layer_neurons(int(name[0]))[name][1])
                    for part, a, b in zip(
                        ("gate", "up", "down"), neurons_of(packed, tensor, run), expected, strict=True
                    ):
                        assert close(a, b, f"{name}.{part}" in kept.requantized)
            else:
                rows = decoded(
                    raw(packed, tensor)[0][:, : 8 * row_bytes(tensor.codec, tensor.columns)],
                    tensor.codec,
                    tensor.columns,
                )[: tensor.rows]
                expected = source.matrix_rows(tensor.matrix, tensor.row0, tensor.row0 + tensor.rows)
                assert close(rows, expected, name in kept.requantized or name.endswith(".router"))


def close(a: np.ndarray, b: np.ndarray, requantized: bool) -> bool:
    if requantized:
        return not np.array_equal(a, b) and float(np.square(a - b).mean() ** 0.5) < 1e-2 * float(b.std())
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def test_what_is_kept_of_which(case):
    name, _, packed = case
    kept, layout = packed.manifest.kept, packed.layout
    if name == "k":
        assert kept.requantized == {}
        assert {part: kept.matrices[f"0.{part}"].value for part in "qkv"} == {"q": "q4_k", "k": "q4_k", "v": "q6_k"}
        assert kept.matrices["1.qkv"] is Codec.Q4_K
        assert [(part.row0, part.rows) for part in layout.parts("0.qkv")] == [(0, 256), (256, 64), (320, 64)]
        assert kept.neurons["1.ffn"].down is Codec.Q4_K
        assert (kept.neurons["0.ffn"].up, kept.neurons["0.ffn"].down) == (Codec.IQ4_XS, Codec.Q6_K)
        assert all(layout.tensors[f"{i}.ffn"].group == 256 for i in range(3))
        assert packed.manifest.weights == "q4_k/q5_k/q6_k/iq4_xs"
    elif name in ("plain", "biases"):
        assert kept.requantized == {"1.k": "F16"}
        assert layout.tensors["0.ffn"].group == 64  # 1088 neurons are no multiple of 128
    elif name == "gpt_oss":
        assert kept.requantized == {}
        assert kept.neurons["0.ffn"].down is Codec.MXFP4
        assert layout.tensors["0.ffn"].group == 64
    elif name == "values that are keys":
        assert kept.requantized == {"1.k": "F16"}
        assert {part.name for part in layout.parts("1.qkv")} == {"1.q", "1.k"}
        assert kept.matrices["4.qkv"] is Codec.Q4_0
    elif name == "layer inputs":
        assert kept.requantized == {"1.k": "F16", "inputs.project": "BF16"}
        assert (kept.matrices["inputs.embed"], kept.matrices["3.input_out"]) == (Codec.Q5_0, Codec.Q4_0)
        assert kept.matrices["3.qkv"] is Codec.Q4_0  # queries alone
    elif name == "experts":
        assert layout.tensors["0.ffn"].group == 128
        assert kept.neurons["0.ffn"].up is Codec.MXFP4
    else:
        assert kept.requantized == {"1.k": "F16", **{f"{i}.ffn.down": "F16" for i in range(len(packed.spec.layers))}}
        assert kept.neurons["2.ffn"].down is Codec.INT8


def test_blocks_begin_on_pages_and_hold_whole_groups(case):
    for tensor in case[2].layout.tensors.values():
        for index in range(tensor.blocks):
            block = tensor.block(index)
            assert block.offset % 4096 == 0 == block.nbytes % 4096
    case[2].verify()


def test_the_manifest_says_it_and_comes_back(case):
    manifest = case[2].manifest
    raw_bytes = manifest.to_bytes()
    assert json.loads(raw_bytes)["version"] == KEPT_VERSION != VERSION
    assert type(manifest).from_bytes(raw_bytes, "m").kept == manifest.kept


def changed(packed: Pack, change) -> bytes:
    body = json.loads((packed.path / MANIFEST_FILE).read_bytes())
    change(body)
    del body["checksum"]
    body["checksum"] = _checksum(body)
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b["kept"]["matrices"].update({"embed": "q9_k"}),
            "embed is in the format 'q9_k', which this flashrt",
        ),
        (lambda b: b["kept"]["neurons"]["0.ffn"].update(up="nvfp4"), "0.ffn is in the format 'nvfp4'"),
        (lambda b: b["kept"]["matrices"].update({"7.qkv": "q8_0"}), "7.qkv is no matrix of this model"),
        (lambda b: b["kept"]["neurons"].update({"x.ffn": b["kept"]["neurons"]["0.ffn"]}), "x.ffn is no feed-forward"),
        (lambda b: b["kept"]["neurons"]["0.ffn"].update(group=96), "bundles of 96 neurons, of 1792"),
        (lambda b: b["kept"]["neurons"]["0.ffn"].update(group=128), "not whole blocks of q6_k"),
        (lambda b: b["kept"]["neurons"]["0.ffn"].update(group=1), "codecs that do not go together"),
        (lambda b: b["kept"]["neurons"]["0.ffn"].update(group=True), "codecs that do not go together"),
        (lambda b: b["kept"]["neurons"]["0.ffn"].update(gate=None), "neurons of another kind"),
        (lambda b: b["kept"]["matrices"].update({"embed": "q8_0"}), "listed with"),
        (lambda b: b.pop("kept"), "damaged"),
        (lambda b: b.update(version=4), "reads versions 2, 3 and 5"),
    ],
)
def test_what_a_manifest_may_not_say(tmp_path_factory, change, message):
    packed = keep(CASES["k"].write(tmp_path_factory.mktemp("x") / "m.gguf"), tmp_path_factory.mktemp("y") / "p")
    with pytest.raises(PackError, match=re.escape(message)):
        type(packed.manifest).from_bytes(changed(packed, change), "m")


@pytest.mark.parametrize("codec", list(KEPT))
def test_weights_that_are_not_finite_are_refused(codec, tmp_path):
    case = Case(
        "llama", {"attn_output.weight": codec.value}, {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32}
    )
    path = case.write(tmp_path / "m.gguf")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_output.weight")
    block = KEPT[codec]
    at = tensor.data_offset + 5 * block.nbytes + (max(block.scales) + 1 if block.scales else 0)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"\xff" if codec is Codec.MXFP4 else b"\x7c")
    with pytest.raises(CheckpointError, match=r"1\.out holds values that are not finite"):
        keep(path, tmp_path / "p")


def test_a_file_that_is_not_quantized_keeps_nothing(tmp_path):
    path = Case("llama", {"attn_q.weight": "BF16"}).write(tmp_path / "m.gguf")
    with open_checkpoint(path) as source:
        assert kept_of(source) is None


def test_a_quantized_file_of_which_nothing_is_kept_says_so(tmp_path):
    """Formats without a kernel become int8 in a pack like any other, but for what its manifest names."""
    q2, random = gguf.GGMLQuantizationType.Q2_K, np.random.default_rng(1)

    def encode(name, values):
        if not name.endswith("attn_output.weight"):
            return None
        blocks = random.integers(0, 256, (values.size // 256, 84), np.uint8)
        blocks[:, 80:] = np.full((1, 2), 0.01, np.float16).view(np.uint8)  # the scales
        return blocks.reshape(len(values), -1), q2

    shape = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 32}
    packed = keep(tiny_gguf("llama", tmp_path / "m.gguf", encode=encode, **shape)[1], tmp_path / "p")
    manifest = packed.manifest
    assert manifest.kept is not None
    assert manifest.kept.codecs == []
    assert {name for name, stored in manifest.kept.requantized.items() if stored == "Q2_K"} == {
        "0.out",
        "1.out",
        "2.out",
    }
    assert manifest.weights == "int8"
    packed.verify()


def test_packing_goes_on_where_it_was(case, tmp_path, monkeypatch):
    """Killed after a file, and finished: the bytes of an undisturbed run."""
    _, path, whole = case
    interrupted(path, tmp_path / "p", monkeypatch, fills=4)
    assert keep(path, tmp_path / "p").manifest == whole.manifest


def test_another_dtype_is_another_job(tmp_path, monkeypatch):
    """Both of them say int8: what is kept tells them apart."""
    path = CASES["plain"].write(tmp_path / "m.gguf")
    interrupted(path, tmp_path / "p", monkeypatch, fills=8)
    with open_checkpoint(path) as source, pytest.raises(UsageError, match="another checkpoint or dtype"):
        pack(source, tmp_path / "p", Codec.INT8, block_bytes=BLOCK_BYTES)


def interrupted(path, out, monkeypatch, fills):
    """Begin to pack a file, and stop after so many parts of tensors."""
    left, fill = [fills], KeptEncoder.fill

    def strike(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return fill(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(KeptEncoder, "fill", strike)
        with pytest.raises(KeyboardInterrupt):
            keep(path, out)
