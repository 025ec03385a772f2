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
from tests.cli.conftest import Cli
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


def test_a_budget_beyond_the_limit_is_said_before_loading(
    pack: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from flashrt.engine import open as loader
    from flashrt.engine.options import LoadOptions
    from flashrt.errors import BudgetWarning

    monkeypatch.setattr(loader, "memory_limit", lambda: 1 << 30)
    with pytest.warns(
        BudgetWarning, match=r"budget of 2.00 GiB, and this process's cgroup allows 1.00 GiB.*--budget-gb"
    ):
        loader.open_model(pack, LoadOptions(budget_gb=2))
    loader.open_model(pack, LoadOptions(budget_gb=1))
    monkeypatch.setattr(loader, "memory_limit", lambda: None)
    loader.open_model(pack, LoadOptions(budget_gb=2))
    monkeypatch.setattr(loader, "installed_bytes", lambda: 1 << 30)
    with pytest.warns(BudgetWarning, match=r"the machine has 1.00 GiB"):
        loader.open_model(pack, LoadOptions(budget_gb=2))
    assert not recwarn.list


def test_notes_on_a_checkpoint_are_said_where_it_is_packed(cli: Cli, tmp_path: Path) -> None:
    from tests.families import tiny_checkpoint

    _, directory = tiny_checkpoint("llama", tmp_path / "model")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    (directory / "model.safetensors.index.json").write_text(index)
    words = "model.safetensors is read: model.safetensors comes before an index"
    first = cli("run", directory, "-p", "the", "-n", 2, "--cache-dir", tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("note: of ")
    assert words in first.stderr
    assert words in cli("pack", directory, tmp_path / "pack").stderr
