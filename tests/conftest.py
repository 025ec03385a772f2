"""Shared by every test: packs of the fake checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flashrt.spec import ModelSpec
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tests.fake_source import DENSE, FakeSource

MakePack = Callable[..., Path]


@pytest.fixture
def make_pack(tmp_path: Path) -> MakePack:
    """Pack the fake checkpoint of a spec into a new directory and return its path."""

    def make(
        spec: ModelSpec = DENSE, codec: Codec = Codec.F32, name: str = "made.pack", block_bytes: int = 1 << 13
    ) -> Path:
        out = tmp_path / name
        pack(FakeSource(spec), out, codec, block_bytes=block_bytes)
        return out

    return make
