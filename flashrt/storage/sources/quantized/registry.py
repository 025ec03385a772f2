"""What `quant_method` names, and the tensors of a quantized checkpoint as its model names them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources.quantized.awq import awq_weights
from flashrt.storage.sources.quantized.compressed import compressed_weights
from flashrt.storage.sources.quantized.fp8 import fp8_weights
from flashrt.storage.sources.quantized.gptq import gptq_weights
from flashrt.storage.sources.quantized.members import Tensors
from flashrt.storage.sources.quantized.mxfp4 import mxfp4_weights
from flashrt.storage.sources.quantized.weights import QuantizedTensor, QuantizedWeights
from flashrt.storage.sources.stored import StoredTensor
from flashrt.storage.sources.tensors import Tensor, TensorReader

Method = Callable[[Mapping[str, Any], Tensors], Iterable[QuantizedWeights]]

METHODS: dict[str, Method] = {
    "awq": awq_weights,
    "compressed-tensors": compressed_weights,
    "fp8": fp8_weights,
    "gptq": gptq_weights,
    "mxfp4": mxfp4_weights,
}
"""quant_method → what finds the quantized matrices among the tensors of a checkpoint."""
_TELLING = (".qweight", ".weight_packed", "_scale_inv", ".weight_scale")


def model_tensors(
    quantization: object,
    stored: dict[str, StoredTensor],
    kept: Mapping[str, str] | None = None,
    headers_only: bool = False,
) -> dict[str, Tensor]:
    """The tensors that a model names: quantized matrices in place of all that they are computed from.

    quantization: the `quantization_config` of a checkpoint; None for one that has none
    kept: which matrices are stored in which blocks of GGUF; without it they are asked, which reads their scales
    headers_only: nothing is read, and it is guessed what is kept
    Raises UnsupportedModelError for a method or an option that is not read, CheckpointError for tensors that are
    missing or do not fit.
    """
    if quantization is None:
        _refuse_quantized(stored)
        return {**stored}
    weights = _weights(quantization, stored)
    members = {member.name for own in weights for member in own.members}
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in stored.items() if name not in members}
    with contextlib.closing(TensorReader(stored)) as reader:
        for own in weights:
            if own.name in tensors:
                raise CheckpointError(f"tensor {own.name} is stored twice: quantized, and as it is")
            keeps = own.keeps(None if headers_only else reader.read) if kept is None else kept.get(own.name)
            tensors[own.name] = QuantizedTensor(own, keeps)
    return tensors


def _refuse_quantized(stored: Tensors) -> None:
    """Raises CheckpointError for tensors that only a quantized checkpoint has."""
    name = next((name for name in stored if name.endswith(_TELLING)), None)
    if name is not None:
        raise CheckpointError(
            f"tensor {name} is of a quantized checkpoint, and config.json has no quantization_config: take the "
            "config.json that belongs to these weights"
        )


def _weights(quantization: object, stored: Tensors) -> list[QuantizedWeights]:
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"config.json: quantization_config is {quantization!r:.80}, expected an object")
    name = quantization.get("quant_method")
    if not isinstance(name, str) or name not in METHODS:
        known = ", ".join(METHODS)
        raise UnsupportedModelError(
            f"quantization by {name!r:.80} is not supported; known: {known}. Take the original, or a GGUF file"
        )
    found = list(METHODS[name](quantization, stored))
    if not found:
        raise CheckpointError(f"config.json says that weights are quantized by {name!r}, and no tensor is stored so")
    return found
