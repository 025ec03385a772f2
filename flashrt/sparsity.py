"""What a calibrated pack may leave out, and what that costs: decided by `flashrt calibrate`, kept in the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from flashrt_kernels.activations import parse

VERSION = 2
LONGEST_CURVE = 64  # points of `RowSparsity.misses`
# Tokens at the start of a sequence that leave nothing out: all later tokens attend to them, and activations a thousand
# times larger than any other token's, which must come out right, arise in them (Xiao et al., arXiv:2309.17453).
SINKS = 4


@dataclass(frozen=True, slots=True)
class ChannelSparsity:
    """One feed-forward block whose gate and up lie by input channel (see `flashrt_kernels.channels`).

    A channel c of the input x takes part from |x_c| * norm_c >= `coarse_from` on, with all its bits from `fine_from`
    on; a neuron with the activation h from |h| * norm >= `neurons_from` on. Thresholds below 0 let everything through.
    """

    fine: int  # channels of a group of 32 that are stored with all their bits
    coarse_from: float
    fine_from: float
    neurons_from: float


@dataclass(frozen=True, slots=True)
class RowSparsity:
    """One feed-forward block whose neurons are mostly zero, and lie hot first; a predictor names those that are not.

    The predictor is a low-rank one of rank `rank`: a neuron takes part whose score is above `threshold`.
    `misses` are the neurons that a token reads, on average, while shares of 0, 1/n, 2/n .. 1 of all neurons are in
    memory, those used last: n + 1 numbers that fall, the first of them being the neurons of a token.

    A head of the attention before the block takes part whose score is above `heads_from`;
    where that is None all do, and no predictor of them is stored.
    """

    rank: int
    threshold: float
    misses: tuple[float, ...]
    heads_from: float | None = None

    def missed(self, share: float) -> float:
        """Neurons that a token reads while a share of all is in memory, interpolated."""
        place = min(max(share, 0.0), 1.0) * (len(self.misses) - 1)
        i = min(int(place), len(self.misses) - 2)
        return self.misses[i] + (place - i) * (self.misses[i + 1] - self.misses[i])


Layers = tuple[ChannelSparsity, ...] | tuple[RowSparsity, ...]


@dataclass(frozen=True, slots=True)
class Sparsity:
    """What all layers of a model may leave out, in one way. `base` is the hash of the pack that it was calibrated for.

    Losses are increases of perplexity, 0.02 being 2%: `max_loss` was asked for, `held_out_loss` is what was found on
    tokens that nothing was fitted to. `figures` are those of the closing table, by layer and overall.
    """

    base: str
    max_loss: float
    held_out_loss: float
    layers: Layers
    figures: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def method(self) -> str:
        """'channels' of the input are left out, or 'rows', which are neurons."""
        return "rows" if self.rows else "channels"

    @property
    def rows(self) -> tuple[RowSparsity, ...]:
        """The layers, where they are calibrated by row; else nothing."""
        return tuple(layer for layer in self.layers if isinstance(layer, RowSparsity))

    @property
    def channels(self) -> tuple[ChannelSparsity, ...]:
        """The layers, where they are calibrated by channel; else nothing."""
        return tuple(layer for layer in self.layers if isinstance(layer, ChannelSparsity))

    def to_json(self) -> dict[str, Any]:
        layers = [asdict(layer) for layer in self.layers]
        return {"method": self.method} | asdict(self) | {"layers": layers, "figures": dict(self.figures)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sparsity:
        """The inverse of `to_json`. Raises TypeError, KeyError or ValueError when fields are missing or wrong."""
        given = dict(data)
        read = {"channels": _channels, "rows": _rows}[given.pop("method")]
        return cls(layers=tuple(map(read, given.pop("layers"))), **given)  # type: ignore[arg-type]


def gives_zeros(activation: str) -> bool:
    """Whether most neurons of a trained model with this activation are exactly zero: ReLU and its kin."""
    return parse(activation)[0] in ("relu", "relu2")


def _channels(data: Mapping[str, Any]) -> ChannelSparsity:
    layer = ChannelSparsity(**data)
    _check_whole("fine", layer.fine, 0, 32)
    for item in fields(layer):
        _check_number(item.name, getattr(layer, item.name))
    return layer


def _rows(data: Mapping[str, Any]) -> RowSparsity:
    layer = RowSparsity(**{**data, "misses": tuple(data["misses"])})
    _check_whole("rank", layer.rank, 1, 1 << 16)
    _check_number("threshold", layer.threshold)
    if layer.heads_from is not None:
        _check_number("heads_from", layer.heads_from)
    _check_whole("the length of misses", len(layer.misses), 2, LONGEST_CURVE)
    for value in layer.misses:
        _check_number("a number of misses", value)
    if layer.misses[-1] != 0 or list(layer.misses) != sorted(layer.misses, reverse=True):
        raise ValueError("misses do not fall to 0")
    return layer


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected {low} to {high}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected a number")
