"""A command opens its pack once, lays it out once, measures the process once, and plans once."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flashrt.budget import planner
from flashrt.calibration.pipeline import Request, calibrate
from flashrt.cli.app import build
from flashrt.engine import draft, loaded_pack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import CpuRuntime
from flashrt.storage import layout, manifest
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack
from tests.families import tiny_checkpoint

RUN = ("--prompt", "the cat", "--max-new-tokens", "3", "--threads", "1")
BUDGET = ("--budget-gb", "1")  # far more than there is to load; the check whether drafts fit needs one


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 pack, and an int4 pack that is calibrated."""
    root = tmp_path_factory.mktemp("loading")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint")
    make_pack(checkpoint, root / "int8", Codec.INT8)
    make_pack(checkpoint, root / "int4", Codec.INT4)
    options = LoadOptions(cache_dir=root / "cache", threads=1)
    calibrate(root / "int4", options, Request(max_loss=0.5, tokens=768), lambda *_: None)
    return root


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    found: Counter[str] = Counter()

    def count(name: str, function: Any, *places: Any) -> None:
        def counted(*arguments: Any, **options: Any) -> Any:
            found[name] += 1
            return function(*arguments, **options)

        for place in places:
            monkeypatch.setattr(place, function.__name__, counted)

    count("opened", Pack.__init__, Pack)
    count("laid out", layout.pack_layout, layout, manifest)
    count("measured", CpuRuntime.fixed_costs, CpuRuntime)
    count("planned", planner.plan, planner, loaded_pack, draft)
    return found


def command(root: Path, name: str, *arguments: str) -> None:
    app = build([name])
    app([name, *arguments, "--cache-dir", str(root / "cache")], standalone_mode=False)


@pytest.mark.parametrize(
    "options", [(), BUDGET, ("--speculate", "off"), (*BUDGET, "--speculate", "4")], ids=["", "budget", "off", "4"]
)
def test_a_run_does_everything_once(packs: Path, counts: Counter[str], options: tuple[str, ...]) -> None:
    command(packs, "run", str(packs / "int8"), *RUN, *options)
    assert counts == {"opened": 1, "laid out": 1, "measured": 1, "planned": 1}


def test_a_chat_does_everything_once(packs: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/null") as silent:
        monkeypatch.setattr(sys, "stdin", silent)
        command(packs, "chat", str(packs / "int8"), *BUDGET)
    assert counts == {"opened": 1, "laid out": 1, "measured": 1, "planned": 1}


def test_a_plan_does_everything_once(packs: Path, counts: Counter[str]) -> None:
    command(packs, "plan", str(packs / "int8"), *BUDGET)
    assert counts == {"opened": 1, "laid out": 1, "measured": 1, "planned": 1}


def test_sparse_mode_compares_with_the_exact_pack(packs: Path, counts: Counter[str]) -> None:
    command(packs, "run", str(packs / "int4"), *RUN, *BUDGET, "--mode", "sparse")
    assert counts == {"opened": 2, "laid out": 2, "measured": 1, "planned": 2}  # each of two packs


def test_a_draft_is_measured_before_the_model_it_drafts_for(packs: Path, counts: Counter[str]) -> None:
    command(packs, "run", str(packs / "int8"), *RUN, *BUDGET, "--draft", str(packs / "int4"))
    assert counts == {"opened": 2, "laid out": 2, "measured": 2, "planned": 2}
