"""What the neurons of a feed-forward block compute, by name.

FATReLU (ProSparse, arXiv:2402.13516, section 3) is relu with a threshold: x where x > threshold, else 0. Clamped SwiGLU
(gpt-oss) is g * sigmoid(alpha * g) * (u + 1), of a gate g of `limit` at most and u within `limit` of zero. Their names
hold the numbers, `fatrelu:0.01` and `clamped_swiglu:1.702:7.0`, so whoever passes on a name passes on all of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

FUNCTIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")
_FATRELU = "fatrelu:"
CLAMPED_SWIGLU = "clamped_swiglu"


class Activation(NamedTuple):
    """One of FUNCTIONS, or CLAMPED_SWIGLU; `threshold` is relu's, or the alpha of a clamped SwiGLU, `limit` its own."""

    function: str
    threshold: float = 0.0
    limit: float = 0.0

    @property
    def gate_only(self) -> bool:
        """Whether it is a function of the gate alone, by which up is multiplied as it is."""
        return self.function != CLAMPED_SWIGLU


def fatrelu(threshold: float) -> str:
    """The name of FATReLU with a threshold."""
    return f"{_FATRELU}{threshold!r}"


def clamped_swiglu(alpha: float, limit: float) -> str:
    """The name of a clamped SwiGLU."""
    return f"{CLAMPED_SWIGLU}:{alpha!r}:{limit!r}"


def parse(activation: object) -> Activation:
    """What a name stands for. Raises ValueError, naming the activation."""
    if activation in FUNCTIONS:
        return Activation(str(activation))
    name, _, text = activation.partition(":") if isinstance(activation, str) else ("", "", "")
    numbers = [_number(part) for part in text.split(":")]
    if all(0 < number < math.inf for number in numbers):
        if name + ":" == _FATRELU and len(numbers) == 1:
            return Activation("relu", numbers[0])
        if name == CLAMPED_SWIGLU and len(numbers) == 2:
            return Activation(name, *numbers)
    known = ", ".join((*FUNCTIONS, f"{_FATRELU}T with a threshold T above zero", f"{CLAMPED_SWIGLU}:ALPHA:LIMIT"))
    raise ValueError(f"activation: expected one of {known}; found {activation!r}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
