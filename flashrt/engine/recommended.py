"""What a model's authors recommend for drawing tokens: generation_config.json, read as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashrt.config import Sampling
from flashrt.errors import PackError, UsageError

_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
"""What transformers takes where a file that says to sample leaves a value out, or null."""
_ALWAYS = {"repetition_penalty": 1.0}


def recommended(generation: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, float]:
    """Values for `Sampling` by name, those that are not `given` otherwise.

    Without `do_sample` the most likely token is taken, and only the repetition penalty counts. -1 switches top_k off,
    as vLLM spells it; a top_p of 1 or more is off, one of 0 leaves the most likely token.

    Raises PackError, naming the option that takes its place, for a value that would count and makes no sense.
    """
    sample = generation.get("do_sample")
    if not isinstance(sample, bool | None):
        raise PackError(f"what the pack's text.json recommends cannot be used: do_sample is {sample!r:.80}")
    wanted = _ALWAYS | (_SAMPLED if sample else {})
    found = {name: _value(generation, name, wanted[name]) for name in wanted if name not in given}
    if found.get("top_p") == 0.0:
        found |= {"top_p": 1.0, "temperature": 0.0}
    if "temperature" in given:
        found.pop("temperature", None)
    return found


def _value(generation: Mapping[str, Any], name: str, default: float) -> float:
    value = generation.get(name)
    if value is None:
        return default
    if name == "top_k" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if name == "top_k" and value == -1 and not isinstance(value, bool):
        return 0
    if name == "top_p" and isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            return 0.0
        value = min(value, 1.0)
    checked: dict[str, Any] = {name: value}
    try:
        Sampling(**checked)
    except UsageError as error:
        option = name.replace("_", "-")
        raise PackError(f"what the pack's text.json recommends cannot be used: {error}. Give --{option}") from None
    return value
