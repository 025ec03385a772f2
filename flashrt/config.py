"""What a user asks of a run, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from flashrt.errors import UsageError
from flashrt_kernels.limits import NARROW_TOKENS

GIB = 1 << 30
LARGEST_BUDGET_GB = 1e9  # 2**60 bytes: beyond any machine, and whole in 64 bits


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    temperature 0 takes the most likely token. Otherwise, in this order: repetition penalty (Keskar et al. 2019),
    temperature, top_k (0: off), top_p (1: off), min_p (0: off).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_k", self.top_k, 0, 1 << 31)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check("min_p", self.min_p, 0.0, 1.0)
        _check("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.top_p == 0.0:
            raise UsageError("top_p is 0, expected more than 0 and at most 1")
        if self.seed is not None and self.seed < 0:
            raise UsageError(f"seed is {self.seed}, expected 0 or more")


def budget_bytes(budget_gb: float) -> int:
    """A budget in GiB as bytes. Raises UsageError unless it is above 0 and no larger than any machine."""
    if not 0 < budget_gb <= LARGEST_BUDGET_GB:
        raise UsageError(f"the budget is {budget_gb} GiB, expected a number above 0, at most {LARGEST_BUDGET_GB:.0f}")
    return int(budget_gb * GIB)


def parse_speculate(speculate: str | int) -> int | None:
    """Tokens of a pass that verifies a draft, at most: 1 for 'off', None for 'auto'. Raises UsageError."""
    if speculate == "auto":
        return None
    if speculate == "off":
        return 1
    try:
        count = int(speculate)
    except ValueError:
        count = 0
    if not 2 <= count <= NARROW_TOKENS:
        raise UsageError(f"--speculate is {speculate!r}, expected off, auto or 2 to {NARROW_TOKENS} tokens per pass")
    return count


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}, expected {low} to {high}")
