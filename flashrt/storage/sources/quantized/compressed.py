"""Checkpoints of compressed-tensors: a scheme for each group of modules, and a format that stores its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flashrt.errors import UnsupportedModelError
from flashrt.storage.sources.quantized.compressed_integers import byte_integers, packed_integers
from flashrt.storage.sources.quantized.integers import IntegerWeights
from flashrt.storage.sources.quantized.members import Tensors, found, member, modules_with, need_matrix
from flashrt.storage.sources.quantized.mxfp4 import MicroscaledFours, microscaled_fours
from flashrt.storage.sources.quantized.nibbles import BLOCK
from flashrt.storage.sources.quantized.nvfp4 import GROUP, ScaledFours, scaled_fours
from flashrt.storage.sources.quantized.scaled import ScaledFloats, scaled_floats
from flashrt.storage.sources.quantized.schemes import WHAT, Scheme, Schemes
from flashrt.storage.sources.quantized.weights import QuantizedWeights

_ACTIVATIONS = (  # of a module's scales and zeros, those that are not of its weights
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "output_global_scale",
)


def compressed_weights(data: Mapping[str, Any], tensors: Tensors) -> Iterator[QuantizedWeights]:
    """Every quantized matrix. Raises CheckpointError for tensors that are missing or do not fit."""
    schemes = Schemes(data)
    for module in _modules(tensors):
        scheme = schemes.of(module)
        read = _FORMATS.get(scheme.format)
        if read is None:
            known = ", ".join(_FORMATS)
            raise UnsupportedModelError(f"{WHAT} format {scheme.format!r:.80} is not supported; known: {known}")
        yield read(tensors, module, scheme)


def _float_weights(tensors: Tensors, module: str, scheme: Scheme) -> ScaledFloats:
    codes, scales = member(tensors, module, "weight", "F8_E4M3"), member(tensors, module, "weight_scale")
    _, columns = need_matrix(codes)
    blocks = {"tensor": None, "channel": (1, columns), "block": scheme.block}
    if (scheme.bits, scheme.type, scheme.symmetric) != (8, "float", True) or scheme.strategy not in blocks:
        raise _unsupported(module, scheme)
    return scaled_floats(codes, scales, blocks[scheme.strategy], found(tensors, module, *_ACTIVATIONS))


def _packed_integers(tensors: Tensors, module: str, scheme: Scheme) -> IntegerWeights:
    return packed_integers(tensors, module, scheme, found(tensors, module, *_ACTIVATIONS))


def _byte_integers(tensors: Tensors, module: str, scheme: Scheme) -> IntegerWeights:
    return byte_integers(tensors, module, scheme, found(tensors, module, *_ACTIVATIONS))


def _naive(tensors: Tensors, module: str, scheme: Scheme) -> QuantizedWeights:
    return (_float_weights if scheme.type == "float" else _byte_integers)(tensors, module, scheme)


def _microscaled_fours(tensors: Tensors, module: str, scheme: Scheme) -> MicroscaledFours:
    codes, scales = member(tensors, module, "weight_packed", "U8"), member(tensors, module, "weight_scale")
    need_matrix(codes)
    if (scheme.bits, scheme.type, scheme.symmetric, scheme.group) != (4, "float", True, BLOCK):
        raise _unsupported(module, scheme)
    members = codes, scales, *found(tensors, module, *_ACTIVATIONS)
    return microscaled_fours(f"{module}.weight", codes, scales, members)


def _scaled_fours(tensors: Tensors, module: str, scheme: Scheme) -> ScaledFours:
    if (scheme.bits, scheme.type, scheme.symmetric, scheme.group) != (4, "float", True, GROUP):
        raise _unsupported(module, scheme)
    return scaled_fours(tensors, module, found(tensors, module, *_ACTIVATIONS))


def _modules(tensors: Tensors) -> list[str]:
    """The modules that have a tensor which only quantized ones have."""
    found = [module for leaf in _LEAVES for module in modules_with(tensors, leaf)]
    codes = (module for module in modules_with(tensors, "weight") if tensors[f"{module}.weight"].dtype in _CODES)
    return list(dict.fromkeys((*found, *codes)))


def _unsupported(module: str, scheme: Scheme) -> UnsupportedModelError:
    return UnsupportedModelError(f"{WHAT} format {scheme} is not supported ({module})")


_LEAVES = ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point", "weight_global_scale")
_CODES = ("F8_E4M3", "I8")
_FORMATS: dict[str, Callable[[Tensors, str, Scheme], QuantizedWeights]] = {
    "float-quantized": _float_weights,
    "int-quantized": _byte_integers,
    "mxfp4-pack-quantized": _microscaled_fours,
    "naive-quantized": _naive,
    "nvfp4-pack-quantized": _scaled_fours,
    "pack-quantized": _packed_integers,
}
