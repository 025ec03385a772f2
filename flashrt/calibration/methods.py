"""The ways to calibrate a model, and which of them a pack takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flashrt.calibration.channel_pack import ChannelPackSource, read_ffn
from flashrt.calibration.fit_channels import ChannelFit, Inputs, fit_channels
from flashrt.calibration.fit_heads import Attended, HeadFit, fit_heads
from flashrt.calibration.fit_rows import Neurons, RowFit, fit_rows
from flashrt.calibration.pack_copy import PackCopy, read_bundles, read_matrix, read_vector
from flashrt.calibration.row_pack import RowPackSource
from flashrt.errors import UnsupportedModelError
from flashrt.sparsity import Layers, gives_zeros
from flashrt.storage.layout import heads_apart
from flashrt.storage.pack import Pack
from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import MATRIX_ROWS, Codec


class Method(Protocol):
    """One way; `unit` is what it leaves out, `tokens` are those of text that it takes when nothing else is asked."""

    unit: str
    tokens: int

    @property
    def samples(self) -> dict[str, int]:
        """What is to be sampled of every block, as `Decoder.observe` names it: how many numbers a token has."""

    def fit(self, i: int, given: Mapping[str, Inputs]) -> Any:
        """What is found out about block `i` from those samples; it can be saved."""

    def load(self, path: Path) -> Any:
        """What was saved."""

    def source(self, fitted: Callable[[int], Any], layers: Layers) -> PackCopy:
        """The contents of a calibrated pack."""


def method_for(base: Pack, kernels: Ops[Any]) -> Method:
    """By row where neurons are zero, else by channel. Raises UnsupportedModelError where neither will do."""
    if base.manifest.kept is not None and base.manifest.kept.codecs:
        raise UnsupportedModelError(
            f"sparse mode is not built for packs that keep the formats of their file, as this one does "
            f"({base.manifest.weights}): pack the checkpoint with --dtype int4, or int8 for an activation like relu"
        )
    if base.spec.delta_nets:
        raise UnsupportedModelError("sparse mode is not built for models with recurrent layers: use --mode exact")
    if base.spec.latent:
        raise UnsupportedModelError("sparse mode is not built for models with latent attention: use --mode exact")
    if any(layer.ffn.gate_bias for layer in base.spec.layers):
        raise UnsupportedModelError("sparse mode is not built for gates with biases: use --mode exact")
    if all(gives_zeros(layer.ffn.activation) for layer in base.spec.layers):
        return _Rows(base, kernels)
    if base.manifest.dtype is not Codec.INT4:
        raise UnsupportedModelError(
            f"sparse mode is built for int4 packs, this one is {base.manifest.dtype.value}: "
            "pack the checkpoint with --dtype int4"
        )
    return _Channels(base, kernels)


class _Channels:
    unit, tokens = "channel", 2048

    def __init__(self, base: Pack, kernels: Ops[Any]) -> None:
        self.base, self.kernels = base, kernels

    @property
    def samples(self) -> dict[str, int]:
        return {"ffn": self.base.spec.hidden}

    def fit(self, i: int, given: Mapping[str, Inputs]) -> ChannelFit:
        return fit_channels(read_ffn(self.base, i), given["ffn"], _up_bias(self.base, i), self.kernels)

    def load(self, path: Path) -> ChannelFit:
        return ChannelFit.load(path)

    def source(self, fitted: Callable[[int], ChannelFit], layers: Any) -> PackCopy:
        return ChannelPackSource(self.base, fitted, layers)


class _Rows:
    unit, tokens = "neuron", 8192  # predictors have more to learn than thresholds

    def __init__(self, base: Pack, kernels: Ops[Any]) -> None:
        self.base, self.kernels = base, kernels

    @property
    def samples(self) -> dict[str, int]:
        hidden, attentions = self.base.spec.hidden, [layer.attention for layer in self.base.spec.layers]
        widths = [attention.heads * attention.head_dim for attention in attentions if heads_apart(attention)]
        return {"ffn": hidden} | ({"attention": hidden, "heads": max(widths)} if widths else {})

    def fit(self, i: int, given: Mapping[str, Inputs]) -> RowFit:
        spec, bundles = self.base.spec, read_bundles(self.base, f"{i}.ffn")
        codec, bias = self.base.manifest.dtype, _up_bias(self.base, i)
        neurons = Neurons(spec.layers[i].ffn, spec.hidden, codec, bundles, bias, self.kernels)
        fitted = fit_rows(neurons, given["ffn"], self.kernels)
        return replace(fitted, heads=self._heads(i, given)) if heads_apart(spec.layers[i].attention) else fitted

    def _heads(self, i: int, given: Mapping[str, Inputs]) -> HeadFit:
        attention, tensors = self.base.spec.layers[i].attention, self.base.layout.tensors
        width = attention.heads * attention.head_dim
        out = read_matrix(self.base, f"{i}.out", self.base.spec.hidden, self.kernels)
        query_bytes = attention.head_dim // MATRIX_ROWS * tensors[f"{i}.qkv"].stride
        attended = Attended(given["heads"].x[:, :width], out, attention.heads)
        return fit_heads(given["attention"], attended, query_bytes, self.kernels)

    def load(self, path: Path) -> RowFit:
        return RowFit.load(path)

    def source(self, fitted: Callable[[int], RowFit], layers: Layers) -> PackCopy:
        return RowPackSource(self.base, fitted, self.kernels)


def _up_bias(base: Pack, i: int) -> Any:
    return read_vector(base, f"{i}.up.bias") if base.spec.layers[i].ffn.bias else None
