"""What a user asks of a run, checked once."""

from __future__ import annotations

import numbers
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashrt.errors import UsageError
from flashrt_kernels.limits import NARROW_TOKENS

if TYPE_CHECKING:
    from flashrt.spec import ModelSpec

GIB = 1 << 30
MOST_SEQUENCES = 496  # computed together: passes have at most 512 rows, and some serve prompts
MOST_THREADS = 1024  # more than any machine has cores
MOST_PENALTY, MOST_BIAS = 2.0, 100.0  # of a logit; as OpenAI's API bounds them
LARGEST_BUDGET_GB = 1e9  # 2**60 bytes: beyond any machine, and whole in 64 bits


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy.

    Logits are changed in this order, at any temperature: by the repetition penalty (Keskar et al. 2019) of tokens of
    prompt and answer; by the presence penalty of tokens of the answer, and the frequency penalty as often as they stand
    there (both subtracted); by `logit_bias`, pairs of a token and what is added. temperature 0 then takes the most
    likely token. Otherwise, in this order: temperature, top_k (0: off), top_p (1: off), min_p (0: off).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        number("temperature", self.temperature, 0.0, 100.0)
        whole("top_k", self.top_k, 0, 1 << 31)
        number("top_p", self.top_p, 0.0, 1.0)
        number("min_p", self.min_p, 0.0, 1.0)
        number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        number("presence_penalty", self.presence_penalty, -MOST_PENALTY, MOST_PENALTY)
        number("frequency_penalty", self.frequency_penalty, -MOST_PENALTY, MOST_PENALTY)
        for token, bias in self.logit_bias:
            whole("a token of logit_bias", token, 0)
            number("a value of logit_bias", bias, -MOST_BIAS, MOST_BIAS)
        if self.top_p == 0.0:
            raise UsageError("top_p is 0, expected more than 0 and at most 1")
        if self.seed is not None:
            whole("seed", self.seed, 0)


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int: an integer of Python's or numpy's, from `low` to `high`. Raises UsageError for all else."""
    upper = "or more" if high is None else f"to {high}"
    if not _is(numbers.Integral, value):
        raise UsageError(f"{name} is {reprlib.repr(value)}, expected a whole number, {low} {upper}")
    if value < low or (high is not None and value > high):
        raise UsageError(f"{name} is {reprlib.repr(value)}, expected {low} {upper}")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float: a number of Python's or numpy's, from `low` to `high`. Raises UsageError for all else."""
    if not _is(numbers.Real, value):
        raise UsageError(f"{name} is {reprlib.repr(value)}, expected a number, {low} to {high}")
    if not low <= value <= high:
        raise UsageError(f"{name} is {reprlib.repr(value)}, expected {low} to {high}")
    return float(value)


def _is(kind: type, value: Any) -> bool:
    """Whether `value` is a number of this kind, which True and False are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def budget_bytes(budget_gb: float) -> int:
    """A budget in GiB as bytes. Raises UsageError unless it is a number above 0 and no larger than any machine."""
    if not _is(numbers.Real, budget_gb) or not 0 < budget_gb <= LARGEST_BUDGET_GB:
        raise UsageError(
            f"the budget is {reprlib.repr(budget_gb)} GiB, expected a number above 0, at most {LARGEST_BUDGET_GB:.0f}"
        )
    return int(budget_gb * GIB)


def checked_loss(max_loss: float) -> float:
    """The rise of perplexity that is allowed, as a share. Raises UsageError."""
    if not _is(numbers.Real, max_loss) or not 0 < max_loss <= 1:
        found = reprlib.repr(max_loss)
        raise UsageError(f"the loss allowed is {found}, expected more than 0 and at most 1 (0.02 is 2%)")
    return float(max_loss)


def checked_context(spec: ModelSpec, asked: int | None, default: int) -> int:
    """The context to plan for: `asked`, or `default` cut to what the model supports. Raises UsageError."""
    if asked is None:
        return min(default, spec.context)
    if asked < 1:
        raise UsageError(f"the context is {asked} tokens, expected 1 or more")
    if asked > spec.context:
        raise UsageError(
            f"a context of {asked} tokens was asked for, the model supports at most {spec.context}: "
            "for more, scale its rotary embedding with --rope-scaling"
        )
    return int(asked)


def parse_keep(keep: str | float) -> float:
    """The share of positions that sparse attention keeps, from '1/16' or 0.0625. Raises UsageError."""
    value: Any = keep
    if isinstance(keep, str):
        above, slash, below = keep.partition("/")
        try:
            value = float(above) / float(below) if slash else float(above)
        except (ValueError, ZeroDivisionError):
            value = None
    if not _is(numbers.Real, value) or not 0 < value <= 1:
        raise UsageError(f"--kv-keep is {reprlib.repr(keep)}, expected more than 0 and at most 1, such as 1/16")
    return float(value)


def parse_speculate(speculate: str | int) -> int | None:
    """Tokens of a pass that verifies a draft, at most: 1 for 'off', None for 'auto'. Raises UsageError."""
    if isinstance(speculate, str):
        if speculate in ("auto", "off"):
            return None if speculate == "auto" else 1
        count: Any = int(speculate) if speculate.isdecimal() and len(speculate) < 3 else 0
    else:
        count = speculate
    if not _is(numbers.Integral, count) or not 2 <= count <= NARROW_TOKENS:
        found = reprlib.repr(speculate)
        raise UsageError(f"--speculate is {found}, expected off, auto or 2 to {NARROW_TOKENS} tokens per pass")
    return int(count)
