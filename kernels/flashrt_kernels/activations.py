"""What the neurons of a feed-forward block compute, by name.

FATReLU (ProSparse, arXiv:2402.13516, section 3) is relu with a threshold: x where x > threshold, else 0. Its name holds
the threshold, `fatrelu:0.01`, so whoever passes on a name passes on all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

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


def _gelu(x: Array) -> Array:
    """By Abramowitz and Stegun's formula 7.1.26 for erf, good to 1.5e-7."""
    z = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    return 0.5 * x * (1 + erf)


_ON_ARRAYS: dict[str, Callable[[Array], Array]] = {
    "silu": lambda x: x / (1 + np.exp(-np.clip(x, -80, None))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "gelu": _gelu,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def function(activation: str) -> Callable[[Array], Array]:
    """What a name stands for, on arrays of float32: for fitting and comparing, where speed does not matter."""
    name, threshold = parse(activation)
    return (lambda x: np.where(x <= threshold, 0, x)) if name == "relu" else _ON_ARRAYS[name]
