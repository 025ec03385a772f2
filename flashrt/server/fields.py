"""The fields that requests share: what they may hold, what is refused by name, and what of them a sampler needs."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from flashrt.config import Sampling
from flashrt.errors import UsageError
from flashrt.server.errors import ApiError, invalid, refused

# Of no effect on what is answered: who asked, and how others may store that.
HARMLESS = ("user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention")
MOST_CHOICES = 16
MOST_STOPS, LONGEST_STOP = 16, 1000

_PATH = re.compile(r" - at `\$\.?([^`]*)`$")
_SAMPLED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_obfuscation` pads chunks: nothing does here."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Fields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What requests for text have in common. None is what is not given."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """How many answers."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= MOST_CHOICES:
            raise invalid("n", f"n is {count}, expected 1 to {MOST_CHOICES}")
        return count

    @property
    def stops(self) -> tuple[str, ...]:
        return checked_stops([self.stop] if isinstance(self.stop, str) else self.stop or [])

    @property
    def include_usage(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "stream_options goes with stream: true")
        return bool(self.stream_options and self.stream_options.include_usage)


Kind = TypeVar("Kind", bound=msgspec.Struct)
Recommended = Callable[[dict[str, Any]], dict[str, Any]]
Refusals = Mapping[str, tuple[str, tuple[Any, ...]]]  # field → why, and the values that ask for nothing


def checked_stops(stops: list[str]) -> tuple[str, ...]:
    """Raises ApiError."""
    if len(stops) > MOST_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise invalid("stop", f"stop: expected at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters")
    return tuple(stops)


def decode(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object. Raises ApiError for all else."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is no JSON: {what}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_json")
    return found


def convert(given: dict[str, Any], kind: type[Kind], refusals: Refusals) -> Kind:
    """The request that an object is. Raises ApiError, by name, for what is unknown, not supported or malformed."""
    kept = {name: value for name, value in given.items() if name not in HARMLESS}
    for name, (why, neutral) in refusals.items():
        value = kept.pop(name, None)
        if value is not None and value not in neutral:
            raise refused(name, why)
    known = kind.__struct_fields__
    if unknown := [name for name in kept if name not in known]:
        name = unknown[0][:100]
        raise ApiError(400, f"unknown parameter {reprlib.repr(name)}", param=name, code="unknown_parameter")
    try:
        return msgspec.convert(kept, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        found = _PATH.search(str(error))
        param = found[1] if found else None
        missing = re.search(r"missing required field `(\w+)`", str(error))
        raise invalid(
            missing[1] if missing else param, f"{param or 'the request'}: {_PATH.sub('', str(error))}"
        ) from None


def sampling(fields: Fields, recommended: Recommended) -> Sampling:
    """How tokens are chosen; see `bias_free_sampling`. Raises ApiError."""
    given = {name: value for name in _SAMPLED if (value := getattr(fields, name)) is not None}
    if given.get("top_k") == -1:  # what others call no limit
        given["top_k"] = 0
    if given.get("seed") == -1:  # and no seed
        del given["seed"]
    try:
        return replace(bias_free_sampling(given, recommended), logit_bias=_bias(fields.logit_bias or {}))
    except UsageError as error:
        raise invalid("logit_bias", str(error)) from None


def bias_free_sampling(given: dict[str, Any], recommended: Recommended) -> Sampling:
    """What is not given is what `recommended` says beside what is. Raises ApiError."""
    try:
        return Sampling(**{**recommended(given), **given})
    except UsageError as error:
        raise invalid(str(error).split()[0], str(error)) from None


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token in given:
        if not token.isdecimal() or len(token) > 9:
            raise invalid("logit_bias", f"logit_bias has {reprlib.repr(token)}, expected ids of tokens")
    return tuple((int(token), bias) for token, bias in given.items())
