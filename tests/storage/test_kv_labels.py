"""Labels on disk: the same again, and whatever is damaged, foreign or made up is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashrt.errors import DiskError, PackError, UsageError
from flashrt.labels import KvLabels, LayerLabels, most_channels, shapes
from flashrt.spec import Attention
from flashrt.storage import kv_labels
from flashrt.storage.kv_labels import LABELS_FILE, find_labels, read_labels, write_labels
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.fake_source import MOE, FakeSource
from tests.families import tiny_checkpoint


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    path = tmp_path_factory.mktemp("labels") / "moe.pack"
    pack(FakeSource(MOE), path, Codec.INT8, block_bytes=1 << 13)
    return Pack(path)


def labels_of(opened: Pack, seed: int = 0, channels: int = 8) -> KvLabels:
    """Labels of every layer but the last."""
    rng, layers, shares = np.random.default_rng(seed), [], []
    for layer in opened.spec.layers[:-1]:
        arrays = {
            name: rng.standard_normal(shape).astype(np.float32)
            for name, shape in shapes(layer.attention, channels).items()
        }
        layers.append(LayerLabels(**{**arrays, "step": np.abs(arrays["step"]) + 0.1}))
        shares.append(tuple(float(share) for share in rng.uniform(0.5, 2, layer.attention.kv_heads)))
    losses = {"1/4": -0.001, "1/16": 0.012}
    return KvLabels(opened.manifest.hash, 8, (*layers, None), (*shares, ()), losses)


def test_round_trip(opened: Pack) -> None:
    labels = labels_of(opened)
    write_labels(opened.path, labels, opened.spec)
    found = read_labels(opened)
    assert found.describe() == labels.describe()
    assert found.layers[-1] is None
    for layer, expected in zip(found.layers[:-1], labels.layers[:-1], strict=True):
        assert layer is not None
        assert expected is not None
        for name, array in layer.arrays().items():
            assert array.dtype == np.float32
            assert np.array_equal(array, expected.arrays()[name])
            assert array.flags.c_contiguous


def test_without_labels_it_says_what_to_run(opened: Pack) -> None:
    (opened.path / LABELS_FILE).unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"flashrt calibrate .* --kv"):
        read_labels(opened)


def test_labels_of_another_pack_are_refused(opened: Pack) -> None:
    write_labels(opened.path, replace(labels_of(opened), base="f" * 64), opened.spec)
    with pytest.raises(PackError, match="another pack"):
        read_labels(opened)


def test_labels_of_a_pack_with_other_layers_are_called_that(opened: Pack, tmp_path: Path) -> None:
    """Whatever their number and shape, if the file is whole."""
    other = make_pack(tiny_checkpoint("llama", tmp_path / "checkpoint")[1], tmp_path / "pack", Codec.INT8)
    assert len(other.spec.layers) != len(opened.spec.layers)
    write_labels(opened.path, labels_of(opened), opened.spec)
    raw = (opened.path / LABELS_FILE).read_bytes()
    (other.path / LABELS_FILE).write_bytes(raw)
    with pytest.raises(PackError, match="another pack"):
        find_labels(other)
    (other.path / LABELS_FILE).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(PackError, match="damaged"):
        find_labels(other)
    (other.path / LABELS_FILE).unlink()
    assert find_labels(other) is None


def test_any_flipped_bit_is_noticed(opened: Pack) -> None:
    write_labels(opened.path, labels_of(opened), opened.spec)
    path = opened.path / LABELS_FILE
    raw = path.read_bytes()
    for at in [*range(0, 4096, 5), *range(4096, len(raw), 97), len(raw) - 1]:
        changed = bytearray(raw)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        with pytest.raises(PackError, match="damaged"):
            read_labels(opened)


@pytest.mark.parametrize("size", [0, 7, 8, 500, 4095, 4096, -4, -1])
def test_a_file_that_was_cut_short_is_refused(opened: Pack, size: int) -> None:
    write_labels(opened.path, labels_of(opened), opened.spec)
    path = opened.path / LABELS_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(PackError, match="damaged"):
        read_labels(opened)


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda described: described.update({name: value})


LIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "version": _set("version", 99),
    "no pack": _set("base", 7),
    "block of 3": _set("block", 3),
    "block of true": _set("block", True),
    "block in a list": _set("block", [8]),
    "no layers": _set("channels", []),
    "huge labels": lambda d: d["channels"].__setitem__(0, 8 << 40),
    "odd labels": lambda d: d["channels"].__setitem__(0, 12),
    "negative labels": lambda d: d["channels"].__setitem__(0, -8),
    "labels as text": lambda d: d["channels"].__setitem__(0, "8"),
    "shares without labels": lambda d: d["shares"].__setitem__(-1, [1.0]),
    "too few shares": lambda d: d["shares"].__setitem__(0, []),
    "a negative share": lambda d: d["shares"][0].__setitem__(0, -1.0),
    "a share that is none": lambda d: d["shares"][0].__setitem__(0, None),
    "an endless share": lambda d: d["shares"][0].__setitem__(0, 1e300),
    "losses as a list": _set("losses", [1]),
    "a loss of nonsense": _set("losses", {"1e999999999": 0.1}),
    "a loss without a number": _set("losses", {"1/16": "much"}),
    "a field more": _set("more", 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_lies_is_refused(opened: Pack, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """With a checksum that is right, as someone who means harm would write it."""
    labels = labels_of(opened)
    described = json.loads(json.dumps(labels.describe()))
    LIES[lie](described)
    layout = kv_labels._shapes(labels.describe(), opened.spec)
    monkeypatch.setattr(kv_labels, "_shapes", lambda *_: layout)
    monkeypatch.setattr(KvLabels, "describe", lambda self: described)
    write_labels(opened.path, labels, opened.spec)
    monkeypatch.undo()
    with pytest.raises(PackError, match="damaged, or of another version"):
        read_labels(opened)


@pytest.mark.parametrize(("name", "value"), [("keys", np.nan), ("low", np.inf), ("step", 0.0), ("step", -1.0)])
def test_numbers_that_are_none_are_refused(opened: Pack, name: str, value: float) -> None:
    labels = labels_of(opened)
    assert labels.layers[0] is not None
    labels.layers[0].arrays()[name].reshape(-1)[3] = value
    write_labels(opened.path, labels, opened.spec)
    with pytest.raises(PackError, match=f"{name}"):
        read_labels(opened)


def test_a_failed_write_leaves_what_was_there(opened: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    write_labels(opened.path, labels_of(opened, 1), opened.spec)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiskError, match="full"):
        write_labels(opened.path, labels_of(opened, 2), opened.spec)
    monkeypatch.undo()
    assert read_labels(opened).describe() == labels_of(opened, 1).describe()


@pytest.mark.parametrize(("dim", "channels"), [(128, 32), (256, 64), (64, 16), (20, 8), (80, 16), (7, None)])
def test_labels_take_a_16th_of_a_key(dim: int, channels: int | None) -> None:
    assert most_channels(Attention(4, 2, dim, 1.0)) == channels
    assert most_channels(Attention(4, 2, dim, 1.0, window=9)) is None
    if channels is not None and dim >= 32:
        assert channels / 2 <= dim * 2 / 16


def test_a_pipe_in_their_place_is_not_waited_for(opened: Pack) -> None:
    path = opened.path / LABELS_FILE
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)  # should it be opened all the same, that does not hang
    os.write(writer, bytes(8))
    try:
        with pytest.raises(PackError, match="is no file: remove it"):
            read_labels(opened)
    finally:
        os.close(writer)
        path.unlink()
