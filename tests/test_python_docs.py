"""What docs/python.md shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flashrt
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint

PAGE = Path(__file__).parents[1] / "docs" / "python.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("docs")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=3, max_position_embeddings=1024)
    make_pack(checkpoint, root / "pack", Codec.INT8)
    return root / "pack"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(
    pack: Path, number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = flashrt.load
    # A tiny model in the place of the demo; a budget would count what the tests hold.
    monkeypatch.setattr(flashrt, "load", lambda path, budget_gb: load(pack, context=512))
    exec(compile(EXAMPLES[number], f"{PAGE.name}, example {number + 1}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
