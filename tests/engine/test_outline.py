"""What starts from a GGUF file's outline, and what needs a pack."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import flashrt
from flashrt.budget.plan import Plan
from flashrt.engine.packing import Packing
from flashrt.errors import BudgetError, CheckpointWarning, FlashrtError
from tests.kept import CASES

PROMPT = [5, 9, 70, 33, 12, 8]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return CASES["plain"].write(tmp_path / "model.gguf")


def packs(cache: Path) -> set[str]:
    return {path.name.split("-")[1] for path in (cache / "packs").iterdir() if path.is_dir()}


def tokens(file: Path, cache: Path) -> list[int]:
    with flashrt.load(file, cache_dir=cache, context=64) as engine:
        return [token.id for token in engine.generate(PROMPT, 8, ignore_eos=True)]


def test_what_pays_soon_is_packed_before_it_is_loaded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: then the pack is found. The tokens are those of the file."""
    cache = tmp_path / "cache"
    expected = tokens(file, cache)
    assert packs(cache) == {"rows"}
    monkeypatch.setattr(Packing, "of", lambda nbytes, *_: Packing(None, nbytes, 1.0, True, "it pays"))  # type: ignore[arg-type]
    monkeypatch.setattr(Plan, "pins_all", lambda *_: False)
    with pytest.warns(CheckpointWarning, match=r"model\.gguf is packed into the cache, once, .*: it pays"):
        assert tokens(file, cache) == expected
    assert packs(cache) == {"rows", "auto"}
    monkeypatch.undo()
    assert tokens(file, cache) == expected


class FakePlan(NamedTuple):
    drafts: bool


@pytest.mark.parametrize(
    ("nbytes", "streaming", "drafts", "free", "first", "why"),
    [
        (10**9, True, True, 10**10, True, "draft"),
        (10**11, True, True, 10**12, False, "draft"),
        (10**9, True, True, 10**8, False, "no room"),
        (10**9, True, False, 10**10, False, "as much"),
        (10**11, False, False, 10**8, True, "too small"),
    ],
)
def test_packing_comes_first_where_it_pays_soon(
    nbytes: int, streaming: bool, drafts: bool, free: int, first: bool, why: str
) -> None:
    plan: Any = FakePlan(False) if streaming else None
    packing = Packing.of(nbytes, plan, FakePlan(drafts), free)  # type: ignore[arg-type]
    assert packing.first is first
    assert why in packing.why


def test_a_budget_that_is_too_small_is_refused_and_nothing_packed(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(BudgetError, match="too small"):
        flashrt.load(file, cache_dir=cache, context=64, budget_gb=0.001)
    assert packs(cache) == {"rows"}


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"kv": "sparse"}])
def test_what_an_outline_cannot_do_is_packed(file: Path, tmp_path: Path, options: dict[str, str]) -> None:
    cache = tmp_path / "cache"
    unlabelled = pytest.raises(FlashrtError) if "kv" in options else contextlib.nullcontext()
    with unlabelled:
        flashrt.load(file, cache_dir=cache, context=64, **options).close()  # type: ignore[arg-type]
    assert "rows" not in packs(cache)
