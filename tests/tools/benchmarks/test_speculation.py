"""The benchmark of drafts, at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tools.support import run_tool, tiny_pack
from tools.benchmarks import speculation
from tools.benchmarks.speculation import FIGURES, compare, row


@pytest.mark.parametrize("kind", [[], ["--ablation"]], ids=["runs", "parts"])
def test_speculation(tmp_path: Path, kind: list[str]) -> None:
    options = ("--budgets", "none", "--sets", "code", "--count", "2", "--tokens", "6", *kind)
    found = run_tool("tools.benchmarks.speculation", tmp_path / "out", tiny_pack(tmp_path), *options)
    modes = [sample["mode"] for sample in found["samples"]]
    if kind:
        assert modes == [*speculation.VARIANTS, *list(speculation.VARIANTS)[1:], "off"]
    else:
        assert modes == ["off", "auto", "auto", "off"]
    assert all(sample["tokens_per_pass"] is None or sample["tokens_per_pass"] >= 1 for sample in found["samples"])


def report(**figures: Any) -> dict[str, Any]:
    return dict.fromkeys(FIGURES) | {"text": "a", "acceptance": None} | figures


def test_who_goes_first_changes() -> None:
    asked: list[tuple[str, str]] = []

    def run(question: str, mode: str) -> dict[str, Any]:
        asked.append((question, mode))
        return report()

    compare(run, ("off", "auto"), ("a", "b", "c"))
    assert asked == [("a", "off"), ("a", "auto"), ("b", "auto"), ("b", "off"), ("c", "off"), ("c", "auto")]


def test_different_texts_are_no_comparison() -> None:
    with pytest.raises(SystemExit, match="question 0 was answered with different texts"):
        compare(lambda question, mode: report(text=mode), ("off", "auto"), ("a",))


def test_an_answer_ends_where_the_model_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(speculation.runs, "flashrt_run", lambda pack, budget, *options: given.extend(options) or {})
    speculation.answer(Path("pack"), "none", 6, ["--kv=sparse"], "why?", "auto")
    assert "--ignore-eos" not in given
    assert given[0] == "--kv=sparse"
    assert given[-2:] == ["--speculate", "auto"]


def test_ratios_are_of_the_same_question() -> None:
    speeds = {("off", 0): 2.0, ("auto", 0): 8.0, ("auto", 1): 3.0, ("off", 1): 1.0, ("off", 2): 5.0, ("auto", 2): None}
    samples = [
        {"budget": "1", "kind": "code", "mode": mode, "question": n} | report(decode_tok_per_s=speed)
        for (mode, n), speed in speeds.items()
    ]
    found = row(samples)
    assert found[4] == {"median": 3.5, "least": 3.0, "most": 4.0, "count": 2}
