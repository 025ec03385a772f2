"""A typed view of a Hugging Face `config.json`: every field read is checked, everything unsupported is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.rope import MAX_FACTOR, ROPE_KINDS, Rope, yarn_attention
from flashrt_kernels.activations import fatrelu

_ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


_MOST = 1 << 31


class Config:
    """The fields of one model's configuration; `family` is used in messages."""

    def __init__(self, data: Mapping[str, Any], family: str):
        self.data, self.family = data, family

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = _MOST) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            most = "at least" if maximum == _MOST else f"at most {maximum} and at least"
            raise CheckpointError(f"{self.family} config: {key} is {value!r}, expected an integer of {most} {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return _number(self.data.get(key, default) if self.data.get(key) is not None else default, key, self.family)

    def cap(self, key: str, default: float = 0.0) -> float:
        """A positive bound; 0 where the field is null, or has no default and is absent."""
        value = self.number(key, 0.0) if key in self.data else default
        if value < 0 or (value == 0 and self.data.get(key) is not None):
            raise CheckpointError(f"{self.family} config: {key} is {value}, expected a positive number or null")
        return value

    def positive(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.number(key, default)
        if value <= 0:
            raise CheckpointError(f"{self.family} config: {key} is {value}, expected a positive number")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers."""
        value = self.data.get(key)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.family} config: {key} is {value!r:.80}, expected a list of numbers")
        return tuple(_number(item, key, self.family) for item in value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.family} config: {key} is {value!r}, expected true or false")
        return value

    def names(self, key: str, count: int) -> list[str] | None:
        """A list of `count` strings (one per layer), or None when the field is absent."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{self.family} config: {key} is {value!r}, expected {count} names")
        return value

    def object(self, key: str) -> Mapping[str, Any]:
        """A JSON object; an empty one when the field is absent or null."""
        value = self.data.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.family} config: {key} is {value!r:.80}, expected an object")
        return value

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raise unless the field is absent, null or one of `allowed`: any other value would change results."""
        value = self.data.get(key)
        if value is not None and value not in allowed:
            raise UnsupportedModelError(f"{self.family} with {key}={value!r} is not supported")

    def activation(self, key: str, default: str) -> str:
        """The activation, as `flashrt_kernels.activations` names it."""
        name = self.data.get(key)
        name = default if name is None else name
        if not isinstance(name, str):
            raise CheckpointError(f"{self.family} config: {key} is {name!r}, expected a name")
        if name == "fatrelu":
            return fatrelu(self._threshold())
        if name not in _ACTIVATION_NAMES:
            known = ", ".join(sorted((*_ACTIVATION_NAMES, "fatrelu")))
            raise UnsupportedModelError(f"{self.family} with activation {name!r} is not supported; known: {known}")
        return _ACTIVATION_NAMES[name]

    def _threshold(self) -> float:
        """FATReLU's, under the name that ProSparse and MiniCPM-S checkpoints give it."""
        threshold = self.number("hidden_act_param")
        if threshold <= 0:
            raise CheckpointError(f"{self.family} config: hidden_act_param is {threshold}, expected a positive number")
        return threshold

    def heads(self) -> tuple[int, int]:
        """(query heads, key/value heads)."""
        heads = self.integer("num_attention_heads", maximum=1 << 16)
        kv_heads = self.integer("num_key_value_heads", heads, maximum=1 << 16)
        if heads % kv_heads:
            raise CheckpointError(
                f"{self.family} config: {heads} heads are not a multiple of {kv_heads} key/value heads"
            )
        return heads, kv_heads

    def head_dim(self, default: int | None = None) -> int:
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if default is None and self.data.get("head_dim") is None and hidden % heads:
            raise CheckpointError(f"{self.family} config: hidden_size {hidden} is not a multiple of {heads} heads")
        return self.integer("head_dim", default or hidden // heads, maximum=1 << 16)

    def optional(self, key: str) -> int | None:
        """A positive integer; None where it is absent or null."""
        return None if self.data.get(key) is None else self.integer(key)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id or a list of them, as a tuple; empty when absent. -1 and null stand for no token."""
        value = self.data.get(key)
        items = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < -1 for item in items):
            raise CheckpointError(f"{self.family} config: {key} is {value!r:.80}, expected token ids")
        return tuple(item for item in items if item >= 0)

    def partial_rope(self, head_dim: int, default_share: float = 1.0) -> Rope:
        """The rotary embedding of a family that may rotate a part of each head."""
        parameters = dict(self.object("rope_scaling") or self.object("rope_parameters"))
        share = self.number("partial_rotary_factor", default_share)
        share = Config(parameters, self.family).number("partial_rotary_factor", share)
        parameters.pop("partial_rotary_factor", None)
        Config(parameters, self.family).refuse("rope_type", *(kind for kind in ROPE_KINDS if kind != "proportional"))
        dims = int(head_dim * share) if 0 < share <= 1 else 0
        if dims < 2 or dims % 2:
            raise UnsupportedModelError(
                f"{self.family} with partial_rotary_factor={share} of heads of {head_dim} numbers is not supported"
            )
        rope = rope_from(self, parameters, self.number("rope_theta", 10000.0))
        return rope if dims == head_dim else replace(rope, dims=dims)

    def rope(self, default_theta: float = 10000.0) -> Rope:
        """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
        self.refuse("partial_rotary_factor", 1, 1.0)
        scaling = self.data.get("rope_scaling") or self.data.get("rope_parameters") or {}
        return rope_from(self, scaling, self.number("rope_theta", default_theta))


def _number(value: Any, key: str, family: str) -> float:
    try:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer that no float reaches
        pass
    raise CheckpointError(f"{family} config: {key} is {value!r:.80}, expected a number")


def rope_from(config: Config, parameters: Any, theta: float) -> Rope:
    """A Rope from one (not nested) dictionary of rope parameters; `theta` is used when it names none."""
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"{config.family} config: rope parameters are {parameters!r}, expected an object")
    rope = Config(parameters, config.family)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind != "proportional":
        rope.refuse("partial_rotary_factor", 1, 1.0)
    theta = rope.number("rope_theta", theta)
    if theta <= 0:
        raise CheckpointError(f"{config.family} config: rope_theta is {theta}, expected a positive number")
    if "mrope_section" in parameters or kind not in ROPE_KINDS:
        name = "mrope" if "mrope_section" in parameters else kind
        raise UnsupportedModelError(
            f"{config.family} with rope scaling {name!r} is not supported; known: {', '.join(ROPE_KINDS)}"
        )
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", _factor(rope))
    if kind == "proportional":
        factor = 1.0 if parameters.get("factor") is None else _factor(rope)
        return Rope(theta, kind, factor, share=rope.number("partial_rotary_factor", 1.0))
    if kind == "dynamic":  # scales from what the config states as its context, whatever it was trained for
        return Rope(theta, "dynamic", _factor(rope), config.integer("max_position_embeddings"))
    context = config.integer("original_max_position_embeddings", _original_context(config, rope))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            _factor(rope),
            context,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    factor = (
        _factor(rope) if parameters.get("factor") is not None else config.integer("max_position_embeddings") / context
    )
    if kind == "longrope":
        return Rope(
            theta,
            "longrope",
            factor,
            context,
            attention_factor=_longrope_attention_factor(rope, factor, context),
            short_factors=rope.numbers("short_factor"),
            long_factors=rope.numbers("long_factor"),
        )
    return Rope(
        theta,
        "yarn",
        factor,
        context,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=rope.flag("truncate", True),
    )


def _factor(rope: Config) -> float:
    factor = rope.number("factor")
    if not 0 < factor <= MAX_FACTOR:
        raise CheckpointError(
            f"{rope.family} config: rope factor is {factor}, expected a positive number up to {MAX_FACTOR}"
        )
    return factor


def _original_context(config: Config, rope: Config) -> int:
    value = rope.data.get("original_max_position_embeddings")
    return (
        rope.integer("original_max_position_embeddings")
        if value is not None
        else config.integer("max_position_embeddings")
    )


def _yarn_attention_factor(rope: Config, factor: float) -> float:
    if rope.data.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale, mscale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if mscale and mscale_all:
        return yarn_attention(factor, mscale) / yarn_attention(factor, mscale_all)
    return yarn_attention(factor)


def _longrope_attention_factor(rope: Config, factor: float, context: int) -> float:
    if rope.data.get("attention_factor") is not None:
        return rope.number("attention_factor")
    return math.sqrt(1 + math.log(factor) / math.log(context)) if factor > 1 and context > 1 else 1.0


def without_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the rotary embedding of text alone: its time, height and width are the same."""
    result = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found := config.get(key), Mapping):
            plain = {k: v for k, v in found.items() if k not in ("mrope_section", "mrope_interleaved")}
            result[key] = {k: "default" if k in ("rope_type", "type") and v == "mrope" else v for k, v in plain.items()}
    return result
