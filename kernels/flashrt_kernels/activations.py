"""What the neurons of a feed-forward block compute, by name.

FATReLU (ProSparse, arXiv:2402.13516, section 3) is relu with a threshold: x where x > threshold, else 0. Its name holds
the threshold, `fatrelu:0.01`, so whoever passes on a name passes on all of it.
"""

from __future__ import annotations

import math

FUNCTIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")
_FATRELU = "fatrelu:"


def fatrelu(threshold: float) -> str:
    """The name of FATReLU with a threshold."""
    return f"{_FATRELU}{threshold!r}"


def parse(activation: object) -> tuple[str, float]:
    """The one of FUNCTIONS that a name stands for, and relu's threshold (0 where the name has none).

    Raises ValueError, naming the activation.
    """
    if activation in FUNCTIONS:
        return str(activation), 0.0
    if isinstance(activation, str) and activation.startswith(_FATRELU):
        threshold = _number(activation.removeprefix(_FATRELU))
        if 0 < threshold < math.inf:
            return "relu", threshold
    known = ", ".join((*FUNCTIONS, f"{_FATRELU}T with a threshold T above zero"))
    raise ValueError(f"activation: expected one of {known}; found {activation!r}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
