"""What a calibrated pack may leave out, and what that costs: decided by `flashrt calibrate`, kept in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

VERSION = 1


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
class Sparsity:
    """How all blocks of a model are thinned out. `base` is the hash of the pack that it was calibrated for.

    Losses are increases of perplexity, 0.02 being 2%: `max_loss` was asked for, `held_out_loss` is what was found on
    tokens that nothing was fitted to. `figures` are those of the closing table, by layer and overall.
    """

    base: str
    max_loss: float
    held_out_loss: float
    layers: tuple[ChannelSparsity, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers], "figures": dict(self.figures)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sparsity:
        """The inverse of `to_json`. Raises TypeError, KeyError or ValueError when fields are missing or wrong."""
        given = dict(data)
        layers = tuple(ChannelSparsity(**layer) for layer in given.pop("layers"))
        for layer in layers:
            _check(layer)
        return cls(layers=layers, **given)


def _check(layer: ChannelSparsity) -> None:
    if not isinstance(layer.fine, int) or not 0 <= layer.fine <= 32:
        raise ValueError(f"fine is {layer.fine!r}, expected 0 to 32")
    for item in fields(layer):
        value = getattr(layer, item.name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ValueError(f"{item.name} is {value!r}, expected a number")
