"""The manifest, and what happens to a pack whose manifest lies: always one PackError, whatever was changed."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.errors import PackError
from flashrt.storage.manifest import MANIFEST_FILE, Manifest
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt_kernels.rows import DTYPES, Codec
from tests.fake_source import MOE, SPECS, FakeSource

Body = dict[str, Any]


def sealed(body: Body) -> bytes:
    """The manifest of `body` with a checksum that is right, as someone who means harm would write it."""
    body = {k: v for k, v in body.items() if k != "checksum"}
    body["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(body).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "moe.pack"
    pack(FakeSource(MOE), path, Codec.INT8, block_bytes=1 << 13)
    return path


@pytest.fixture(scope="module")
def body(whole: Path) -> Body:
    return json.loads((whole / MANIFEST_FILE).read_bytes())


@pytest.fixture
def opened_with(whole: Path, tmp_path: Path) -> Callable[[bytes], Pack]:
    """Open the pack with another manifest."""
    path = tmp_path / "changed.pack"
    shutil.copytree(whole, path)

    def open_with(raw: bytes) -> Pack:
        (path / MANIFEST_FILE).write_bytes(raw)
        return Pack(path)

    return open_with


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("codec", DTYPES)
def test_round_trip(tmp_path: Path, name: str, codec: Codec) -> None:
    written = pack(FakeSource(SPECS[name]), tmp_path / "p", codec)
    raw = (tmp_path / "p" / MANIFEST_FILE).read_bytes()
    assert raw == written.to_bytes()
    assert Manifest.from_bytes(raw, "here") == written
    assert Manifest.from_bytes(raw, "here").to_bytes() == raw


def test_any_flipped_bit_is_noticed(whole: Path) -> None:
    raw = (whole / MANIFEST_FILE).read_bytes()
    for at in range(0, len(raw) - 1, 7):  # the last byte is the newline
        changed = bytearray(raw)
        changed[at] ^= 1 << (at % 8)
        try:
            same = json.loads(bytes(changed)) == json.loads(raw)  # blanks may change, and nothing else
        except ValueError:
            same = False
        if not same:
            with pytest.raises(PackError, match="here"):
                Manifest.from_bytes(bytes(changed), "here")


@pytest.mark.parametrize("keep", [0, 1, 2, 100, 0.5, -2])
def test_cut_short(opened_with: Callable[[bytes], Pack], whole: Path, keep: float) -> None:
    raw = (whole / MANIFEST_FILE).read_bytes()
    with pytest.raises(PackError, match=MANIFEST_FILE):
        opened_with(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])


@pytest.mark.parametrize(
    "raw",
    [
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b'"\\ud800"',
        b"NaN",
        b"\0" * 9,
    ],
)
def test_not_a_manifest_at_all(raw: bytes) -> None:
    with pytest.raises(PackError, match="here"):
        Manifest.from_bytes(raw, "here")


def _set(path: str, value: Any) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        *outer, last = (int(p) if p.isdigit() else p for p in path.split("/"))
        for key in outer:
            body = body[key]
        body[last] = value

    return change


def _escape(body: Body) -> None:
    body["files"]["../../etc/passwd"] = body["files"].pop("resident.safetensors")


def _extra(body: Body) -> None:
    body["files"]["layer-002.safetensors"] = body["files"]["layer-001.safetensors"]


LAYER = "spec/layers/1/layer"
LIES: dict[str, Callable[[Body], None]] = {
    "path out of the directory": _escape,
    "one file too many": _extra,
    "one file too few": lambda body: body["files"].pop("layer-001.safetensors"),
    "text file elsewhere": _set("text_files", {"../secret": "00"}),
    "text files a list": _set("text_files", ["a"]),
    "layer a list": _set("spec/layers/1/layer", [True]),
    "size": _set("files/resident.safetensors/bytes", 1 << 62),
    "negative size": _set("files/resident.safetensors/bytes", -1),
    "infinite size": _set("files/resident.safetensors/bytes", float("inf")),
    "no checksums": _set("files/layer-001.safetensors/blocks_crc32", {}),
    "checksums of nothing": _set("files/layer-001.safetensors/blocks_crc32", {"1.ffn": ""}),
    "checksums not hexadecimal": _set("files/layer-001.safetensors/blocks_crc32/1.ffn", "zz" * 12),
    "version": _set("version", 1),
    "dtype": _set("dtype", "int2"),
    "block size 0": _set("block_bytes", 0),
    "block size of a lie": _set("block_bytes", 1 << 40),
    "block size a text": _set("block_bytes", "1"),
    "vocab": _set("spec/vocab", 1 << 60),
    "vocab 0": _set("spec/vocab", 0),
    "vocab a fraction": _set("spec/vocab", 8.0),
    "vocab true": _set("spec/vocab", True),
    "hidden": _set("spec/hidden", 10**30),
    "context": _set("spec/context", 0),
    "negative positions": _set("spec/positions", -1),
    "position offset": _set("spec/position_offset", -5),
    "a million layers": _set("spec/layers/0/count", 10**6),
    "many runs of layers": lambda body: body["spec"].update(layers=body["spec"]["layers"] * 3000),
    "no layers": _set("spec/layers", []),
    "layers 0 times": _set("spec/layers/0/count", 0),
    "heads": _set(f"{LAYER}/attention/heads", 3),
    "rows that no kernel takes": _set("spec/hidden", 65537),
    "heads that no kernel takes": _set(f"{LAYER}/attention/head_dim", 578),
    "more heads than kernels take": lambda body: body["spec"]["layers"][1]["layer"]["attention"].update(
        heads=258, kv_heads=2, head_dim=256
    ),
    "positions that end before the context": _set("spec/positions", 31),
    "positions that end before the context with their offset": lambda body: body["spec"].update(
        positions=33, position_offset=2
    ),
    "keys of a layer behind": _set(f"{LAYER}/attention/kv_from", 1),
    "keys of a layer that is not alike": lambda body: body["spec"]["layers"][1]["layer"]["attention"].update(
        kv_from=0, softcap=3.0
    ),
    "keys of no layer": _set(f"{LAYER}/attention/kv_from", -1),
    "keys of a text": _set(f"{LAYER}/attention/kv_from", "0"),
    "layer inputs wider than kernels take": _set("spec/layer_inputs", 65535),
    "layer inputs below zero": _set("spec/layer_inputs", -2),
    "norms of experts alone": _set(f"{LAYER}/ffn/branch_norms", True),
    "share of a rope": lambda body: body["spec"]["layers"][1]["layer"]["attention"]["rope"].update(
        kind="proportional", share=0.0
    ),
    "kv heads 0": _set(f"{LAYER}/attention/kv_heads", 0),
    "experts": _set(f"{LAYER}/ffn/experts", 1 << 40),
    "more experts a token than there are": _set(f"{LAYER}/ffn/experts_per_token", 4),
    "neurons": _set(f"{LAYER}/ffn/neurons", 1 << 50),
    "activation": _set(f"{LAYER}/ffn/activation", "swish2"),
    "activation a list": _set(f"{LAYER}/ffn/activation", ["relu"]),
    "threshold below zero": _set(f"{LAYER}/ffn/activation", "fatrelu:-0.5"),
    "threshold no number": _set(f"{LAYER}/ffn/activation", "fatrelu:nan"),
    "gated a list": _set(f"{LAYER}/ffn/gated", []),
    "scale a text": _set(f"{LAYER}/attention/scale", "big"),
    "scale NaN": _set(f"{LAYER}/attention/scale", float("nan")),
    "rope a list": _set(f"{LAYER}/attention/rope", [1]),
    "rope theta 0": _set(f"{LAYER}/attention/rope/theta", 0),
    "rope theta a text": _set(f"{LAYER}/attention/rope/theta", "x"),
    "rope kind": _set(f"{LAYER}/attention/rope/kind", "dynamic"),
    "rope factor 0": lambda body: body["spec"]["layers"][1]["layer"]["attention"]["rope"].update(
        kind="linear", factor=0
    ),
    "yarn without a context": _set(f"{LAYER}/attention/rope/kind", "yarn"),
    "window": _set(f"{LAYER}/attention/window", 0),
    "unknown field": _set("spec/colour", "red"),
    "norm": _set("spec/norm", "batch"),
    "norm eps": _set("spec/norm_eps", None),
    "embed scale": _set("spec/embed_scale", float("inf")),
    "tied a text": _set("spec/tied", "no"),
    "eos a text": _set("spec/eos", ["x"]),
    "eos of a lie": _set("spec/eos", [1 << 40]),
    "bos a fraction": _set("spec/bos", 1.5),
    "spec null": _set("spec", None),
    "files null": _set("files", None),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_is_one_pack_error(opened_with: Callable[[bytes], Pack], body: Body, lie: Callable[[Body], None]) -> None:
    changed = copy.deepcopy(body)
    lie(changed)
    with pytest.raises(PackError, match=MANIFEST_FILE):
        opened_with(sealed(changed))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ("rows that no kernel takes", "a hidden size of 65537"),
        ("heads that no kernel takes", "heads of 578 numbers"),
        ("keys of a layer behind", "layer 1 attends to what layer 1 keeps"),
        ("keys of a layer that is not alike", "layer 1 attends to what layer 0 keeps"),
        ("layer inputs wider than kernels take", "65535 numbers for each layer"),
        ("norms of experts alone", "norms of experts and of a shared one"),
        ("more heads than kernels take", "258 heads of 256"),
        ("positions that end before the context", "a table of 31 positions"),
        ("positions that end before the context with their offset", "a table of 33 positions"),
    ],
)
def test_what_kernels_cannot_compute_is_refused_for_that(body: Body, lie: str, reason: str) -> None:
    changed = copy.deepcopy(body)
    LIES[lie](changed)
    with pytest.raises(PackError, match=f"here: {reason}"):
        Manifest.from_bytes(sealed(changed), "here")


def test_opening_with_the_seal_renewed_works(opened_with: Callable[[bytes], Pack], body: Body) -> None:
    assert opened_with(sealed(body)).spec == MOE  # so that the lies above are refused for what they say


def test_layers_are_counted_before_they_are_built(body: Body) -> None:
    changed = copy.deepcopy(body)
    runs = [run | {"count": 4096} for run in body["spec"]["layers"]]
    changed["spec"]["layers"] = runs * (11_000_000 // len(json.dumps(runs)))
    raw = sealed(changed)
    tracemalloc.start()
    with pytest.raises(PackError, match="at most 4096 in all"):
        Manifest.from_bytes(raw, "here")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * len(raw)  # what parsing it as JSON takes, and 1.4 GB before


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from(
            [-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, float("nan"), float("inf"), "", "..", "/", "\0"]
        ),
        st.floats(),
        st.text(max_size=8),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def _places(node: Any, place: tuple = ()) -> list[tuple]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place, *(p for key, child in items for p in _places(child, (*place, key)))]


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_fuzz(whole: Path, body: Body, data: st.DataObject) -> None:
    """Any values in any places: PackError, or a pack whose layout agrees with its files. Never much memory."""
    changed = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(_places(changed)[1:]))
        node = changed
        for key in place[:-1]:
            node = node[key]
        if data.draw(st.booleans()) and isinstance(node, dict):
            node.pop(place[-1])
        else:
            node[place[-1]] = data.draw(values)
        if not changed:
            break
    raw = sealed(changed)
    tracemalloc.start()
    try:
        manifest = Manifest.from_bytes(raw, "here")
        files = {name: (whole / name).stat().st_size for name in manifest.layout.file_bytes}
        assert files == manifest.layout.file_bytes
        for layer in manifest.spec.layers:
            if layer.attention.rope is not None:
                layer.attention.rope.inverse_frequencies(layer.attention.head_dim)
    except PackError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 << 20
