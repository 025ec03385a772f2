"""Golden bytes of format version 2. A change here is a new version of the format, not a new set of sums."""

from __future__ import annotations

import hashlib
import json
import struct

import numpy as np
import pytest

from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.manifest import FileEntry, Manifest
from flashrt.storage.pack import Pack
from flashrt.storage.safetensors_file import build_header
from flashrt_kernels import ops
from flashrt_kernels.rows import DTYPES, Codec, bundle_stride, row_bytes
from tests.conftest import MakePack
from tests.fake_source import DENSE, MOE, UNGATED, FakeSource, pattern

SUMS = {
    "dense f32": {
        "layer-000.safetensors": "213407ed32e3f3e3785694d75fd2edd6dabdcdcaeb752d395c7498e4b8974fd2",
        "layer-001.safetensors": "2b1a0c88abea3249f91541af366bc902a11c3f660f75f5544aed8600191048f0",
        "manifest.json": "d3a0ea62fd360491dd2c6fd608af84efc2a11c5695d330d222616e1cc465383e",
        "resident.safetensors": "d1d0237f686bd545eb7cd65b51f1d7597d05ef7c4a402bec7059a12a91fb0e24",
    },
    "dense bf16": {
        "layer-000.safetensors": "78dcfa8e56dd237ed1d5b42b567b2526e48efa3c53fb672f45e289ef66fc29a5",
        "layer-001.safetensors": "d22177cefbd208261f969df994c3c8495ed39e9122dcd218640995da3da6a075",
        "manifest.json": "b121322be82aa523a7ddcc0498dd279e6e07b51f5e273952d24671e85ee9a1c1",
        "resident.safetensors": "79ec6a3d0185642f30a8eaaa9c822add86abc590e20772ab7d6d70483a582883",
    },
    "ungated f32": {
        "layer-000.safetensors": "f7230375e6417662f9d5bbfeddac2296e74f83bc91e1ad3a215c847ec2ba81e6",
        "manifest.json": "1c540b44a2710bb1b2f3f6ceb8b3d3b24f9a880073222a93b3cae3ce7ca47efe",
        "resident.safetensors": "6bc12b1fa2fbc0363c62a54dc5ff05304c623b006e30b1e0665ab708fbb0ff41",
    },
    "ungated bf16": {
        "layer-000.safetensors": "26c1d6be9fbcdf1b12eaf9d77bd2f417881320d175b562171220e9e7a1143933",
        "manifest.json": "c9d93252af3789905bb937c8b57c3f226bf5f68fe90b7e33c006a79a980a0ef9",
        "resident.safetensors": "5619991b3b8768f360a7668053cb8debc7dbce7af164185b552db41f3ab0dc81",
    },
    "moe f32": {
        "layer-000.safetensors": "d53d4221efd25c009d9d0c9eddcfb6e3cf05362867bde01a80f5b3e37fe69694",
        "layer-001.safetensors": "415ea2f308b143e39b3cd672b3f52ebd16afc556753911c7f1d7bddaedcb84bb",
        "manifest.json": "7e2c3820054421483f7c9b18ff6919f30e30c8a34cf1cf74e1d3e6f1db8208b9",
        "resident.safetensors": "800e1768cd8fc806e90262b5a1658ba1ed89bd231bb31944ce483caf085b893a",
    },
    "moe bf16": {
        "layer-000.safetensors": "b5ce30faf8282b38e8cb0dc3c004998513a37b18e2ef3f7b681a20ba8551f140",
        "layer-001.safetensors": "83936b783a15032cb9483d2c852802c5e7c537aec04d37ad9288af638a2ecdba",
        "manifest.json": "a98fd20d8c7cf7d000101608467c9fc59dc836b5f39ca04a0a4153c33d1eec22",
        "resident.safetensors": "69123e2d8230354687c7c704f0ce5047e0e4d97e729c951f241d15c8618975f3",
    },
}

SMALL = ModelSpec(
    family="small",
    vocab=3,
    hidden=2,
    layers=(Layer(Attention(1, 1, 1, 1.0), Ffn(2, "silu")),),
    context=4,
    tied=True,
)


@pytest.mark.parametrize(("name", "codec"), [(n, c) for n in ("dense", "ungated", "moe") for c in ("f32", "bf16")])
def test_whole_files(make_pack: MakePack, name: str, codec: str) -> None:
    path = make_pack({"dense": DENSE, "ungated": UNGATED, "moe": MOE}[name], Codec(codec))
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}
    del sums["tokenizer.json"], sums["text.json"]
    assert sums == SUMS[f"{name} {codec}"]


def test_header_by_hand() -> None:
    header = build_header({"a": ("U8", (2, 64)), "b": ("F32", (3,))})
    text = (
        b'{"__metadata__":{"format":"flashrt"},'
        b'"a":{"dtype":"U8","shape":[2,64],"data_offsets":[0,128]},'
        b'"b":{"dtype":"F32","shape":[3],"data_offsets":[128,140]}}'
    )
    assert header == struct.pack("<Q", 4088) + text + b" " * (4088 - len(text))


@pytest.mark.parametrize("columns", [1, 4000, 4200])
def test_a_header_ends_on_a_page(columns: int) -> None:
    header = build_header({"n" * columns: ("U8", (1, 1))})
    assert len(header) % 4096 == 0
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
    assert json.loads(header[8:])


def test_a_file_by_hand(make_pack: MakePack) -> None:
    """Layer 0 of the smallest of models in float32: header, qkv, out, neurons, norms."""
    raw = (make_pack(SMALL, Codec.F32) / "layer-000.safetensors").read_bytes()
    row, bundle = 4 * 64, 8 * 4 * 64

    def at(offset: int, values: np.ndarray) -> None:
        assert raw[offset : offset + values.nbytes] == values.astype("<f4").tobytes()
        assert not any(raw[offset + values.nbytes : offset + row])

    qkv = pattern("0.qkv", 3, 2)  # three rows of one bundle; a page holds two bundles
    for i in range(3):
        at(4096 + i * row, qkv[i])
    assert not any(raw[4096 + 3 * row : 4096 + 2 * bundle])

    out = pattern("0.out", 2, 1)
    for i in range(2):
        at(8192 + i * row, out[i])
    assert not any(raw[8192 + 2 * row : 8192 + 2 * bundle])

    stride = 3 * row  # gate, up, down of a neuron; 16 neurons are the fewest that end on a page
    for neuron in range(2):
        for part, name in enumerate(("gate", "up", "down")):
            at(12288 + neuron * stride + part * row, pattern(f"0.0.{name}", 2, 2)[neuron])
    end = 12288 + 16 * stride
    assert end % 4096 == 0
    assert not any(raw[12288 + 2 * stride : end])

    norms = np.concatenate([pattern("0.norm.attention", 1, 2)[0], pattern("0.norm.ffn", 1, 2)[0]])
    assert raw[end:] == norms.astype("<f4").tobytes()


def test_int8_row_by_hand() -> None:
    """65 weights: two groups of 64, codes first, then one bfloat16 scale a group."""
    weights = np.zeros((1, 65), np.float32)
    weights[0, 0], weights[0, 1], weights[0, 63] = 127.0, -127.0, 1.0
    weights[0, 64] = -254.0
    row = np.full((1, row_bytes(Codec.INT8, 65)), 0xFF, np.uint8)
    ops.load("cpu").quantize(weights, Codec.INT8, row)
    codes = bytes([127, 256 - 127]) + bytes(61) + bytes([1]) + bytes([256 - 127]) + bytes(63)
    assert row.tobytes() == codes + bytes.fromhex("803f") + bytes.fromhex("0040")


def test_int4_row_by_hand() -> None:
    """64 weights, one span of two groups: codes, scale codes, offset codes, u, v."""
    half = bytes(0x10 * (8 + i) + i for i in range(8)) + bytes(0x10 * (7 - i) + 15 - i for i in range(8))
    codes = half + half
    row = codes + bytes([4, 8]) + bytes([2, 1]) + struct.pack("<ff", 0.25, 0.5)
    assert len(row) == row_bytes(Codec.INT4, 64) == 44
    out = np.full((1, 64), np.nan, np.float32)
    ops.load("cpu").dequantize(np.frombuffer(row, np.uint8)[None], Codec.INT4, 64, out)
    q = np.arange(32) % 16
    np.testing.assert_array_equal(out[0, :32], 0.25 * 4 * q - 0.5 * 2)
    np.testing.assert_array_equal(out[0, 32:], 0.25 * 8 * (15 - q) - 0.5 * 1)


@pytest.mark.parametrize(("codec", "row"), [("f32", 512), ("bf16", 256), ("int8", 132), ("int4", 80)])
def test_sizes_of_rows_and_bundles(codec: str, row: int) -> None:
    assert row_bytes(Codec(codec), 65) == row_bytes(Codec(codec), 128) == row
    assert bundle_stride(Codec(codec), 65, 3) == -(-3 * row // 64) * 64


def test_bf16_rounds_to_even() -> None:
    weights = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.0]], np.float32)
    row = np.zeros((1, row_bytes(Codec.BF16, 4)), np.uint8)
    ops.load("cpu").quantize(weights, Codec.BF16, row)
    assert row[0, :8].tobytes().hex() == "803f803f823f00c0"


def test_manifest_by_hand() -> None:
    """Keys, their order, and the checksum: SHA-256 of the compact, key-sorted JSON without it."""
    manifest = Manifest(
        name="small",
        source="nowhere",
        fingerprint="f",
        dtype=Codec.F32,
        spec=SMALL,
        files={"resident.safetensors": FileEntry(4096, "00" * 32, 7, {"embed": (1, 0xFFFFFFFF)}, 9)},
        text_files={"text.json": "11" * 32},
        block_bytes=1 << 20,
    )
    body = json.loads(manifest.to_bytes())
    assert list(body) == [
        *("format", "version", "name", "source", "fingerprint", "dtype", "block_bytes", "spec", "text_files", "files"),
        "checksum",
    ]
    assert body["files"]["resident.safetensors"] == {
        "bytes": 4096,
        "sha256": "00" * 32,
        "header_crc32": 7,
        "blocks_crc32": {"embed": "00000001ffffffff"},
        "vectors_crc32": 9,
    }
    checksum = body.pop("checksum")
    assert checksum == hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert checksum == manifest.hash


@pytest.mark.parametrize("codec", DTYPES)
def test_packing_twice_gives_the_same_bytes(make_pack: MakePack, codec: Codec) -> None:
    first, second = make_pack(MOE, codec, "a"), make_pack(MOE, codec, "b")
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_the_name_of_a_pack_does_not_reach_its_data(make_pack: MakePack) -> None:
    pack = Pack(make_pack(SMALL))
    assert pack.manifest.name == FakeSource(SMALL).name
    assert all(b"fake" not in (pack.path / file).read_bytes() for file in pack.layout.file_bytes)
