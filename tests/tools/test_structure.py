"""Counts of how a checkout is built, on one that is written here, and on this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import structure

FILES = {
    "flashrt/__init__.py": "",
    "flashrt/engine.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from flashrt.run import Run
        class Engine:
            size: int
            def __init__(self, expert_slots: int, *, b: int, **c: int) -> None: ...
            @property
            def one(self) -> int: ...
            def two(self, x: int) -> int: ...
    """,
    "flashrt/run.py": """
        from flashrt.engine import Engine
        class Run:
            def only(self) -> None:
                import flashrt.late
    """,
    "flashrt/late.py": "import flashrt.run\n# experts are named in a comment only",
    "flashrt/experts.py": "experts = 1",
    "flashrt/arch/mixtral.py": "experts = 1",
    "flashrt/cache/a.py": "import flashrt.cache.b",
    "flashrt/cache/b.py": "from flashrt.cache import a",
    "kernels/flashrt_kernels/ops.py": "def channel_gate(): ...",
    "docs/architecture.md": "One two\n\n- three",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        (tmp_path / name).write_text("\n".join(line.removeprefix("        ") for line in lines))
    return tmp_path


def test_counts(checkout: Path) -> None:
    found = structure.structure(checkout)
    assert found["modules"] == 9
    assert found["ffn_kind_files"]["modules"] == ["flashrt.engine", "flashrt_kernels.ops"]
    assert found["widest_class"] == {"name": "flashrt.engine.Engine", "methods": 3}
    assert (found["parameters"]["max"], found["parameters"]["of"]) == (3, "flashrt.engine.__init__")
    assert found["parameters"]["functions"] == 5
    circles = {name: entry["circles"] for name, entry in found["import_circles"].items()}
    own = ["flashrt.cache.a", "flashrt.cache.b"]
    assert circles == {
        "at import": [own],
        "with type checking": [own, ["flashrt.engine", "flashrt.run"]],
        "with functions": [own, ["flashrt.engine", "flashrt.late", "flashrt.run"]],
    }
    assert found["words"] == 4


def test_this_checkout(capsys: pytest.CaptureFixture[str]) -> None:
    structure.main([])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["modules"] > 100
    assert 5 < found["kernel_depth"] < 40


def test_the_depth_is_that_of_the_checkout(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structure.main([str(checkout)])
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["kernel_depth"] is None
    assert "no depth:" in err
