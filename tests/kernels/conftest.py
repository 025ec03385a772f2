"""Backends, packed weights and arrays for the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from flashrt_kernels import cpu
except ImportError:  # not built: `helpers` skips its tests; those of the GPU do without
    cpu = None


@pytest.fixture(autouse=True)
def _default_state() -> Iterator[None]:
    if cpu is not None:
        cpu.set_threads(2)
    yield
    if cpu is not None:
        cpu.force_isa(None)


@pytest.fixture(params=[] if cpu is None else cpu.available_isas())
def isa(request: pytest.FixtureRequest) -> str:
    """Runs the test once per instruction set of this machine."""
    cpu.force_isa(request.param)
    return str(request.param)
