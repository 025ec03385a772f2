"""generation_config.json as people have it: read as transformers reads it, or the option that helps is named."""

from __future__ import annotations

from typing import Any

import pytest

from flashrt.engine.recommended import recommended
from flashrt.errors import PackError

SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_p": 0.9}, {}),
        ({"do_sample": None, "temperature": 0.7}, {}),
        ({"do_sample": False, "top_k": "nonsense", "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"do_sample": True}, SAMPLED),
        ({"do_sample": True, "temperature": None, "top_k": None, "top_p": None, "min_p": None}, SAMPLED),
        ({"do_sample": True, "top_k": -1}, SAMPLED | {"top_k": 0}),
        ({"do_sample": True, "top_k": 0}, SAMPLED | {"top_k": 0}),
        ({"do_sample": True, "top_k": 20.0}, SAMPLED | {"top_k": 20}),
        ({"do_sample": True, "top_p": 1}, SAMPLED),
        ({"do_sample": True, "top_p": 1.5}, SAMPLED),
        ({"do_sample": True, "top_p": 0}, SAMPLED | {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0}, SAMPLED | {"temperature": 0}),
        ({"do_sample": True, "min_p": 0.05, "temperature": 1}, SAMPLED | {"min_p": 0.05}),
    ],
)
def test_values(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert recommended(fields, {}) == {"repetition_penalty": 1.0} | expected


def test_what_is_given_comes_first() -> None:
    fields = {"do_sample": True, "temperature": "hot", "top_p": 0, "top_k": 5}
    found = recommended(fields, {"temperature": 0.3, "min_p": 0.1})
    assert found == {"top_k": 5, "top_p": 1.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": -2},
        {"top_k": True},
        {"top_k": 2.5},
        {"top_p": -0.1},
        {"top_p": "0.9"},
        {"min_p": 2},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"repetition_penalty": 0},
        {"do_sample": "yes"},
    ],
)
def test_nonsense_is_named(fields: dict[str, Any]) -> None:
    name = next(iter(fields)).replace("_", ".")
    with pytest.raises(PackError, match=f"text.json recommends cannot be used: {name} is"):
        recommended({"do_sample": True, **fields}, {})
