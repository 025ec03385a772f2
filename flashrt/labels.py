"""Labels of keys: a few numbers of 4 bits each, by which decode passes choose the tokens that they attend to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from flashrt.spec import Attention, ModelSpec

Array = np.ndarray

VERSION = 1
CHANNEL_STEP = 8  # labels have a multiple of so many numbers
BLOCKS = (1, 2, 4, 8, 16)  # positions that may be chosen together: what divides a group of 16
LARGEST_SHARE = 64.0
MOST_LOSSES = 64


@dataclass(frozen=True, slots=True, eq=False)
class LayerLabels:
    """How one layer's keys are labelled, by KV head; float32, for keys and queries after RoPE. r numbers a label."""

    keys: Array  # [kv_heads, r, head_dim]: the label values of a key k are keys @ k
    queries: Array  # [kv_heads, r, head_dim]: those of a query q are queries @ q; their product is about q · k
    low: Array  # [kv_heads, r]: the label value of code 0
    step: Array  # [kv_heads, r]: between codes, which are 0 to 15

    @property
    def channels(self) -> int:
        """r."""
        return int(self.keys.shape[1])

    def arrays(self) -> dict[str, Array]:
        """By name, in the order of a file."""
        return {"keys": self.keys, "queries": self.queries, "low": self.low, "step": self.step}


@dataclass(frozen=True, slots=True, eq=False)
class KvLabels:
    """The labels of a model. `base` is the hash of the pack that they were calibrated for.

    A layer without labels attends to everything: it sees a window, or was found to need all of it. `shares` are what
    the share of positions to keep is multiplied by, for every layer and KV head; none for a layer without labels.
    `losses` say by how much perplexity rose on text that nothing was fitted to, by the share kept: {"1/16": 0.01}.
    """

    base: str
    block: int  # neighbouring positions that are chosen together
    layers: tuple[LayerLabels | None, ...]
    shares: tuple[tuple[float, ...], ...]
    losses: Mapping[str, float] = field(default_factory=dict)
    version: int = VERSION

    def loss(self, keep: float) -> float | None:
        """By how much perplexity rises at most where a share is kept, by what was measured; None: nothing says.

        Where that share was not measured, the next smaller one is as bad at least. Where all is kept, nothing is lost.
        """
        if keep >= 1:
            return 0.0
        known = {share: loss for text, loss in self.losses.items() if (share := share_of(text)) <= keep * (1 + 1e-9)}
        return known[max(known)] if known else None

    def describe(self) -> dict[str, Any]:
        """All but the arrays, for a file's header."""
        return {
            "version": self.version,
            "base": self.base,
            "block": self.block,
            "channels": [None if layer is None else layer.channels for layer in self.layers],
            "shares": [list(shares) for shares in self.shares],
            "losses": dict(self.losses),
        }


def share_of(keep: str) -> float:
    """The share that a text such as '1/16' or '0.0625' means."""
    return float(Fraction(keep))


def most_channels(attention: Attention) -> int | None:
    """How many numbers a label has: half a byte each, within a 16th of a key's bfloat16 bytes, 8 at least.

    None for a layer that has no labels: one that sees a window, keeps latents, or has heads narrower than that.
    """
    if attention.window is not None or attention.keys_only or attention.head_dim < CHANNEL_STEP:
        return None
    return max(attention.head_dim // 4 // CHANNEL_STEP * CHANNEL_STEP, CHANNEL_STEP)


def shapes(attention: Attention, channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `LayerLabels.arrays`."""
    heads, dim = attention.kv_heads, attention.head_dim
    wide, narrow = (heads, channels, dim), (heads, channels)
    return {"keys": wide, "queries": wide, "low": narrow, "step": narrow}


def check_description(data: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raises ValueError for what `describe` cannot have said of a model of this kind."""
    names = {"version", "base", "block", "channels", "shares", "losses"}
    if not isinstance(data, Mapping) or set(data) != names:
        raise ValueError(f"it does not describe {', '.join(sorted(names))}")
    if data["version"] != VERSION:
        raise ValueError(f"its version is {data['version']!r}, expected {VERSION}")
    if not isinstance(data["base"], str):
        raise ValueError("it names no pack")
    if not _whole(data["block"]) or data["block"] not in BLOCKS:
        raise ValueError(f"its blocks are of {data['block']!r} positions, expected one of {BLOCKS}")
    for name in ("channels", "shares"):
        if not isinstance(data[name], list) or len(data[name]) != len(spec.layers):
            raise ValueError(f"its {name} are not those of {len(spec.layers)} layers")
    for i, (channels, shares) in enumerate(zip(data["channels"], data["shares"], strict=True)):
        if i in spec.attentions:
            _check_layer(spec.attentions[i], channels, shares)
        elif channels is not None or shares:
            raise ValueError(f"labels of layer {i}, which does not attend")
    losses = data["losses"]
    if not isinstance(losses, Mapping) or len(losses) > MOST_LOSSES:
        raise ValueError("its losses are no figures by share kept")
    for keep, loss in losses.items():
        _check_keep(keep)
        _check_number("a loss", loss, -1.0, math.inf)


def check_arrays(layer: LayerLabels) -> None:
    """Raises ValueError for numbers that are not finite, and for steps that are not above 0."""
    for name, values in layer.arrays().items():
        if not np.isfinite(values).all():
            raise ValueError(f"not all of its {name} are finite")
    if not (layer.step > 0).all():
        raise ValueError("not all of its steps are above 0")


def _check_layer(attention: Attention, channels: Any, shares: Any) -> None:
    most = most_channels(attention)
    if channels is None:
        if shares != []:
            raise ValueError("a layer without labels has shares")
        return
    if most is None or not _whole(channels) or channels % CHANNEL_STEP or not 0 < channels <= most:
        raise ValueError(f"a label has {channels!r} numbers, expected up to {most} for a layer of this kind")
    if not isinstance(shares, list) or len(shares) != attention.kv_heads:
        raise ValueError(f"a layer's shares are not those of {attention.kv_heads} heads")
    for share in shares:
        _check_number("a share", share, 0.0, LARGEST_SHARE)


def _check_keep(keep: str) -> None:
    if re.fullmatch(r"1/[1-9][0-9]{0,5}|0\.[0-9]{1,6}", keep) is None:
        raise ValueError(f"a loss is that of keeping {keep!r}, expected a share such as 1/16")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected {low} to {high}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
