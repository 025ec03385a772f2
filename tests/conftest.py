"""Shared by every test: packs of the fake checkpoint, one thread for torch, and where the time went."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from flashrt.spec import ModelSpec
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tests.fake_source import DENSE, FakeSource

MakePack = Callable[..., Path]

# Before anybody imports torch. Models are tiny: its threads would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With `--durations`, what each folder of tests took."""
    if terminalreporter.config.option.durations is None:
        return
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[str(PurePosixPath(report.location[0]).parent)] += report.duration
    terminalreporter.section("seconds of each folder")
    for folder, taken in seconds.most_common():
        terminalreporter.line(f"{taken:7.1f} {folder}")


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
