"""Labels of keys: a few numbers of 4 bits each, by which decode passes choose the tokens that they attend to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class LayerLabels:
    """How one layer's keys are labelled; float32, after RoPE. r numbers a label."""

    keys: Array  # [kv_heads, r, head_dim]: a key's label values are keys @ k
    queries: Array  # [kv_heads, r, head_dim]: a query's are queries @ q
    low: Array  # [kv_heads, r]: the label value of code 0
    step: Array  # [kv_heads, r]: between codes, which are 0 to 15


@dataclass(frozen=True, slots=True, eq=False)
class KvLabels:
    base: str
    block: int
    layers: tuple[LayerLabels | None, ...]
    shares: tuple[tuple[float, ...], ...]
    losses: Mapping[str, float] = field(default_factory=dict)
