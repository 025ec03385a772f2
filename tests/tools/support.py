"""Running a tool as its users do, at toy size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint
from tools.benchmarks import page
from tools.benchmarks.harness import record

ROOT = Path(__file__).parents[2]
FIELDS = ("schema", "tool", "commit", "date", "machine", "versions", "command", "parameters", "samples", "summary")


def run_tool(module: str, out: Path, *arguments: object) -> dict[str, Any]:
    """The record that a tool writes: the one that it prints, of the common form, and one that the page can show."""
    command = [sys.executable, "-m", module, *map(str, arguments), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = record.load(out)
    assert found == json.loads(done.stdout.splitlines()[-1])
    assert tuple(found) == FIELDS
    assert found["tool"] == module.rpartition(".")[2]
    assert found["command"].startswith(f"python -m {module}")
    assert str(out.parent) not in json.dumps(found), "a folder of this machine"
    assert "## toy" in page.section("toy", found)
    return found


def tiny_pack(folder: Path) -> Path:
    """A chat model of random weights."""
    _, checkpoint = tiny_checkpoint("qwen2", folder / "checkpoint", seed=3)
    make_pack(checkpoint, folder / "pack", Codec.INT4)
    return folder / "pack"
