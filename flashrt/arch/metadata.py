"""A typed view of GGUF metadata: every value is checked for its type when it is read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from flashrt.errors import CheckpointError

T = TypeVar("T")


class Metadata:
    """Values by key, below a prefix; each reading raises CheckpointError for a value of another type.

    Scalars are Python's own, arrays of strings are lists, arrays of numbers and booleans `array.array`.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self.values, self.prefix = values, prefix

    def below(self, prefix: str) -> Metadata:
        return Metadata(self.values, self.prefix + prefix)

    def get(self, key: str) -> Any:
        """The value as it is, None when absent."""
        return self.values.get(self.prefix + key)

    def integer(self, key: str, default: T = None) -> int | T:  # type: ignore[assignment]
        return self._typed(key, default, "an integer", lambda v: type(v) is int)

    def number(self, key: str, default: T = None) -> float | T:  # type: ignore[assignment]
        return self._typed(key, default, "a number", lambda v: type(v) is int or _is_finite(v))

    def flag(self, key: str, default: bool) -> bool:
        return self._typed(key, default, "true or false", lambda v: type(v) is bool)

    def string(self, key: str, default: T = None) -> str | T:  # type: ignore[assignment]
        return self._typed(key, default, "a string", lambda v: isinstance(v, str))

    def strings(self, key: str) -> list[str] | None:
        return self._typed(key, None, "a list of strings", lambda v: isinstance(v, list))

    def integers(self, key: str) -> Sequence[int] | None:
        return self._typed(key, None, "a list of integers", lambda v: _is_array(v, "bBhHiIqQ"))

    def numbers(self, key: str) -> Sequence[float] | None:
        return self._typed(key, None, "a list of numbers", lambda v: _is_array(v, "bBhHiIqQfd"))

    def per_layer(self, key: str) -> int | Sequence[int] | None:
        """One integer, or one for each layer."""
        return self.integers(key) if isinstance(self.get(key), array) else self.integer(key)

    def _typed(self, key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        value = self.get(key)
        if value is None:
            return default
        if not fits(value):
            raise CheckpointError(f"GGUF metadata: {self.prefix}{key} is {_shown(value)}, expected {expected}")
        return value


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_array(value: Any, codes: str) -> bool:
    return isinstance(value, array) and value.typecode in codes


def _shown(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list | array) else f"{value!r:.80}"
