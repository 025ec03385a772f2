"""What starts from a GGUF file's outline, and what needs a pack."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import flashrt
from flashrt.budget.plan import Plan
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


def test_what_does_not_fit_is_packed_before_it_is_loaded(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: then the pack is found. The tokens are those of the file."""
    cache = tmp_path / "cache"
    expected = tokens(file, cache)
    assert packs(cache) == {"file"}
    monkeypatch.setattr(Plan, "pins_all", lambda *_: False)
    with pytest.warns(CheckpointWarning, match=r"model\.gguf is packed into the cache, as its weights do not fit"):
        assert tokens(file, cache) == expected
    assert packs(cache) == {"file", "auto"}
    monkeypatch.undo()
    assert tokens(file, cache) == expected


def test_a_budget_that_is_too_small_is_refused_and_nothing_packed(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(BudgetError, match="too small"):
        flashrt.load(file, cache_dir=cache, context=64, budget_gb=0.001)
    assert packs(cache) == {"file"}


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"kv": "sparse"}])
def test_what_an_outline_cannot_do_is_packed(file: Path, tmp_path: Path, options: dict[str, str]) -> None:
    cache = tmp_path / "cache"
    unlabelled = pytest.raises(FlashrtError) if "kv" in options else contextlib.nullcontext()
    with unlabelled:
        flashrt.load(file, cache_dir=cache, context=64, **options).close()  # type: ignore[arg-type]
    assert "file" not in packs(cache)
