"""Rotary position embedding: the frequencies of every kind of scaling, and what a user asks of them.

Angles are float64 throughout: at a million positions a float32 angle is wrong in its second decimal.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import asdict, dataclass
from typing import Any

from flashrt.errors import UsageError

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
SCALING_KINDS = ("linear", "dynamic", "yarn")  # those that a factor alone describes
MAX_CONTEXT = 1 << 31  # tokens
MAX_FACTOR = 1 << 16  # of a config
MAX_ASKED_FACTOR = 1024.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding, halves rotated against each other (the NeoX layout).

    kind: 'default', 'linear' (positions / factor), 'dynamic' (NTK-aware theta), 'llama3' (Llama 3.1's piecewise
    scaling), 'yarn' (arXiv:2309.00071), 'longrope' (arXiv:2402.13753) or 'proportional' (the slowest pairs of a head
    stay as they are, the others have the frequencies of a whole head). Unused fields keep their defaults.

    Frequencies of 'dynamic' and 'longrope' depend on a length. It is the context that a sequence is planned for, never
    the length reached so far: all keys of a sequence are rotated alike, however its tokens are cut into passes.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0  # tokens that the model was trained for before it was scaled; 0: not known
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn, longrope: cosines and sines are multiplied by it
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factors: tuple[float, ...] = ()  # longrope: divide the head_dim / 2 frequencies up to the original context
    long_factors: tuple[float, ...] = ()  # longrope: beyond it
    dims: int = 0  # numbers of a head that are rotated, the first ones; 0: all
    share: float = 1.0  # proportional: of the pairs of a head, those that are rotated

    def width(self, head_dim: int) -> int:
        """Numbers of a head of `head_dim` that are rotated."""
        return self.dims or head_dim

    @property
    def reach(self) -> int:
        """Tokens that the scaling is made for, where factor and original context say it; otherwise 0."""
        return int(self.factor * self.original_context) if self.kind in ("dynamic", "yarn") else 0

    def variant(self, context: int) -> int:
        """The same number for contexts of which `inverse_frequencies` are the same."""
        if self.kind == "dynamic":
            return max(context, self.original_context)
        return int(self.kind == "longrope" and context > self.original_context)

    def inverse_frequencies(self, head_dim: int, context: int = 0) -> list[float]:
        """The width / 2 angular frequencies, radians per position, of a sequence planned for `context` tokens."""
        width = self.width(head_dim)
        theta = self._dynamic_theta(width, context) if self.kind == "dynamic" else self.theta
        plain = [theta ** (-2.0 * i / width) for i in range(width // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        if self.kind == "llama3":
            return [self._llama3(f) for f in plain]
        if self.kind == "yarn":
            return self._yarn(plain, width)
        if self.kind == "longrope":
            factors = self.long_factors if context > self.original_context else self.short_factors
            return [f / by for f, by in zip(plain, factors, strict=True)]
        if self.kind == "proportional":
            pairs = int(self.share * width // 2)
            return [f / self.factor if i < pairs else 0.0 for i, f in enumerate(plain)]
        return plain

    def problem(self, head_dim: int, context: int) -> str | None:
        """Why heads of `head_dim` numbers cannot be rotated so for up to `context` tokens; None when they can."""
        width = self.width(head_dim)
        if self.kind not in ROPE_KINDS or type(width) is not int or width % 2 or not 0 < width <= head_dim:
            return f"cannot rotate {width} of the {head_dim} numbers of a head by rope {self.kind!r}"
        if not 0 < self.share <= 1:
            return f"rope {self.kind!r} of {self.share} of a head"
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(self, name)
                if len(factors) != width // 2:
                    return f"longrope has {len(factors)} {name}, expected {width // 2}: half of what is rotated"
                if not all(type(by) in (int, float) and math.isfinite(by) and by > 0 for by in factors):
                    return f"longrope has {name} that are not positive numbers"
        try:
            tried = [f for length in (0, context) for f in self.inverse_frequencies(head_dim, length)]
            finite = all(map(math.isfinite, tried))
        except (ArithmeticError, ValueError, TypeError):
            finite = False
        return None if finite else f"{self} gives no frequencies"

    def to_json(self) -> dict[str, Any]:
        """A JSON object; lists of factors, `dims` and `share` are left out where they say nothing."""
        silent = (("dims", 0), ("share", 1.0))
        return {name: value for name, value in asdict(self).items() if value != () and (name, value) not in silent}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Rope:
        """The inverse of `to_json`. Raises TypeError when fields are missing, unknown or no lists."""
        factors = {name: tuple(value) for name, value in data.items() if name in ("short_factors", "long_factors")}
        return cls(**{**data, **factors})

    def _dynamic_theta(self, width: int, context: int) -> float:
        ratio = max(context, self.original_context) / self.original_context
        return self.theta * (self.factor * ratio - (self.factor - 1)) ** (width / (width - 2))

    def _llama3(self, frequency: float) -> float:
        turns = self.original_context * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency

    def _yarn(self, plain: list[float], width: int) -> list[float]:
        def dimension(turns: float) -> float:
            return width * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        span = max(high - low, 0.001)
        result = []
        for i, frequency in enumerate(plain):
            interpolated = min(max((i - low) / span, 0.0), 1.0)
            result.append(interpolated * frequency / self.factor + (1 - interpolated) * frequency)
        return result


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """What `--rope-scaling` asks: contexts up to `factor` times the length that the model was trained for."""

    kind: str
    factor: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"

    def rope(self, theta: float, trained: int) -> Rope:
        """The rope of a model trained for `trained` tokens, as a config with this kind and factor describes it."""
        attention = yarn_attention(self.factor) if self.kind == "yarn" else 1.0
        original = 0 if self.kind == "linear" else trained
        return Rope(theta, self.kind, self.factor, original, attention_factor=attention)


def parse_rope_scaling(text: Any) -> RopeScaling:
    """A RopeScaling from 'linear:4', 'dynamic:2' or 'yarn:4'. Raises UsageError for anything else."""
    kind, _, number = text.partition(":") if isinstance(text, str) else ("", "", "")
    try:
        factor = float(number) if len(number) < 32 else math.nan
    except ValueError:
        factor = math.nan
    if kind not in SCALING_KINDS or not 1 < factor <= MAX_ASKED_FACTOR:
        raise UsageError(
            f"--rope-scaling is {reprlib.repr(text)}, expected {', '.join(SCALING_KINDS[:-1])} or {SCALING_KINDS[-1]} "
            f"with a factor above 1 and up to {MAX_ASKED_FACTOR:g}, as in yarn:4"
        )
    return RopeScaling(kind, factor)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies cosines and sines by, for a context `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
