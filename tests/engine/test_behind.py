"""Engines whose first pass computes while weights are still read: the same bits, and failures that are named."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from flashrt.cache.device import CpuDevice
from flashrt.engine.build import build_engine, load_tokenizer
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import runtime_for
from flashrt.errors import PackError
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, tiny_engine, tiny_plan
from tests.families import tiny_checkpoint

PROMPT, TOKENS = list(range(20, 50)), [3, 5, 7]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    path = tmp_path_factory.mktemp(request.param)
    return make_pack(tiny_checkpoint(request.param, path / "model")[1], path / "pack", Codec.INT4)


def behind(packed: Pack, share: float) -> Engine:
    runtime = runtime_for("cpu", threads=2)
    the_plan = tiny_plan(packed, runtime, share)
    return build_engine(packed, the_plan, load_tokenizer(packed), runtime, behind=True)


class Gate:
    """Lets blocks of start-up through once it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, fill = threading.Event(), CpuDevice.fill

        def gated(device: CpuDevice, items: Iterable[Any], arrived: Any) -> None:
            def one_by_one() -> Any:
                for item in items:
                    if threading.current_thread().name == "flashrt-load":
                        assert self.open.wait(10), "the engine waits for weights"
                    yield item

            fill(device, one_by_one(), arrived)

        monkeypatch.setattr(CpuDevice, "fill", gated)


def behind_gate(packed: Pack, share: float, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that is there before its weights, which arrive a little later."""
    gate = Gate(monkeypatch)
    engine = behind(packed, share)
    threading.Timer(0.01, gate.open.set).start()
    return engine


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_first_pass_has_the_same_bits(packed: Pack, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny_engine(packed, share) as engine:
        expected = logits_of(engine, PROMPT, TOKENS)
    for _ in range(2):
        with monkeypatch.context() as patch, behind_gate(packed, share, patch) as engine:
            assert np.array_equal(logits_of(engine, PROMPT, TOKENS), expected)


def test_closing_while_weights_are_read(packed: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    behind_gate(packed, 1.0, monkeypatch).close()
    assert not [thread for thread in threading.enumerate() if thread.name == "flashrt-load"]


def test_damage_is_named_by_what_needs_it(packed: Pack) -> None:
    file = packed.path / "layer-002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-9000] + b"damaged" + data[-8993:])
    try:
        with behind(packed, 1.0) as engine, pytest.raises(PackError, match="does not match its checksum"):
            logits_of(engine, PROMPT, TOKENS)
    finally:
        file.write_bytes(data)
