"""FP8 as DeepSeek writes it (`quant_method: fp8`): a scale for each block of a matrix, or one for the matrix.

The scale is what weights are multiplied by, though it is called `weight_scale_inv`. Scales of activations are not read:
activations are not quantized here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashrt.errors import CheckpointError
from flashrt.storage.sources.quantized.members import Tensors, found
from flashrt.storage.sources.quantized.module_names import Exempt
from flashrt.storage.sources.quantized.options import block_size, options, strings
from flashrt.storage.sources.quantized.scaled import ScaledFloats, scaled_floats
from flashrt.storage.sources.stored import StoredTensor

_READ = ("quant_method", "weight_block_size", "modules_to_not_convert", "ignored_layers", "fmt", "expert_dtype")
_HARMLESS = ("activation_scheme", "scale_fmt", "dequantize", "modules_to_convert")
_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = ("activation_scale", "input_scale")
_BLOCK = [128, 128]


def fp8_weights(data: Mapping[str, Any], tensors: Tensors) -> Iterator[ScaledFloats]:
    """Every FP8 matrix. Raises CheckpointError where a scale is missing or has another shape."""
    config = options(data, "fp8", _READ, _HARMLESS)
    config.refuse("fmt", "e4m3")
    config.refuse("expert_dtype", "fp8")
    block = block_size(config, "weight_block_size", config.data.get("weight_block_size", _BLOCK))
    exempt = Exempt(strings(config, "modules_to_not_convert") or strings(config, "ignored_layers"))
    for tensor in tensors.values():
        if tensor.dtype == "F8_E4M3" and len(tensor.shape) > 1:
            module = tensor.name.removesuffix(".weight")
            exempt.refuse(module)
            scales = _scales(tensors, tensor.name)
            whole = scales.shape in ((), (1,))
            yield scaled_floats(tensor, scales, None if whole else block, found(tensors, module, *_ACTIVATIONS))


def _scales(tensors: Tensors, name: str) -> StoredTensor:
    there = [tensors[name + end] for end in _SCALES if name + end in tensors]
    if not there:
        raise CheckpointError(f"tensor {name} is stored as F8_E4M3, and its scale {name}{_SCALES[0]} is missing")
    return there[0]
