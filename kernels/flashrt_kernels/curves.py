"""Activations on numpy arrays: for fitting and comparing, where speed does not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashrt_kernels.activations import parse

Array = NDArray[Any]


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
    """What a name stands for, on arrays of float32."""
    name, threshold, _ = parse(activation)
    return (lambda x: np.where(x <= threshold, 0, x)) if name == "relu" else _ON_ARRAYS[name]
