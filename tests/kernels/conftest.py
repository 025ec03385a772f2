"""Backends, packed weights and arrays for the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

cpu = pytest.importorskip("flashrt_kernels.cpu", reason="the extension is not built")


@pytest.fixture(autouse=True)
def _default_state() -> Iterator[None]:
    cpu.set_threads(2)
    yield
    cpu.force_isa(None)


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Runs the test once per instruction set of this machine."""
    cpu.force_isa(request.param)
    return str(request.param)
