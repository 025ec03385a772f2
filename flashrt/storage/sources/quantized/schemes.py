"""Which scheme of a compressed-tensors configuration quantizes a module, and what a scheme says of weights.

What is said of activations is left unread: they are not quantized here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashrt.arch.config import Config
from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.storage.sources.quantized.module_names import Targets
from flashrt.storage.sources.quantized.options import block_size, group_size, options, strings

WHAT = "compressed-tensors"
_READ = ("quant_method", "config_groups", "format", "ignore", "quantization_status", "sparsity_config")
_HARMLESS = ("kv_cache_scheme", "global_compression_ratio", "version", "run_compressed", "dequantize")
_GROUP_READ = ("targets", "weights", "format")
_GROUP_HARMLESS = ("input_activations", "output_activations")
_WEIGHTS_READ = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder")
_WEIGHTS_HARMLESS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some modules are quantized.

    strategy: what shares a scale: 'tensor', 'channel', 'group', 'tensor_group' or 'block'
    group: columns that share one (None: all of a row)
    """

    format: str
    bits: int
    type: str
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.format} with {self.bits}-bit {self.type} weights by {self.strategy}"


class Schemes:
    """The schemes of a `quantization_config`. Raises UnsupportedModelError and CheckpointError."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        config = options(data, WHAT, _READ, _HARMLESS)
        config.refuse("quantization_status", "compressed", "frozen")  # the format says how tensors are stored
        Config(config.object("sparsity_config"), f"{WHAT} sparsity").refuse("format", "dense")
        self._ignored = Targets(strings(config, "ignore"))
        self._schemes: dict[str, Scheme] = {}  # by target
        for name, group in config.object("config_groups").items():
            own = options(_object(group, name), f"{WHAT} {name}", _GROUP_READ, _GROUP_HARMLESS)
            if own.data.get("weights") is not None:
                form = own.data.get("format") or config.data.get("format")
                scheme = _scheme(_object(own.data["weights"], f"{name}.weights"), str(form), name)
                self._schemes |= dict.fromkeys(strings(own, "targets"), scheme)
        self._targets = Targets(self._schemes)

    def of(self, module: str) -> Scheme:
        """The scheme of a module that is stored quantized.

        Names come before patterns, and these before classes; among several of a kind, the first in order. Raises
        CheckpointError where none targets the module.
        """
        if self._ignored.naming(module) is not None:
            raise CheckpointError(f"{module} is stored quantized, and the quantization config says to ignore it")
        kind = "Embedding" if module.endswith("embed_tokens") else "Linear"
        target = self._targets.naming(module) or (kind if kind in self._targets else None)
        if target is None:
            raise CheckpointError(f"{module} is stored quantized, and no group of the quantization config targets it")
        return self._schemes[target]


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnsupportedModelError(f"{WHAT} quantization with {name}={value!r:.80} is not supported")
    return value


def _scheme(data: Mapping[str, Any], form: str, group: str) -> Scheme:
    config = options(data, f"{WHAT} {group}", _WEIGHTS_READ, _WEIGHTS_HARMLESS)
    config.refuse("dynamic", False)
    config.refuse("actorder", False, "group", "weight", "static", "dynamic")
    columns = None if config.data.get("group_size") is None else group_size(config)
    strategy = config.data.get("strategy")
    if strategy is None:
        strategy = "group" if columns else "channel" if config.data.get("group_size") is not None else "tensor"
    return Scheme(
        form,
        config.integer("num_bits", 8),
        str(config.data.get("type") or "int"),
        config.flag("symmetric", True),
        str(strategy),
        columns,
        _block(config),
    )


def _block(config: Config) -> tuple[int, int] | None:
    size = config.data.get("block_structure")
    if isinstance(size, str):  # as "128x128"
        size = [int(n) if n.isdecimal() and len(n) < 10 else 0 for n in size.split("x")]
    return block_size(config, "block_structure", size)
