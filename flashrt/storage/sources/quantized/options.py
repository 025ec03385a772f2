"""A `quantization_config`, of which every option is read, known to change no weight, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flashrt.arch.config import Config
from flashrt.errors import CheckpointError, UnsupportedModelError


def options(data: Mapping[str, Any], what: str, read: Iterable[str], harmless: Iterable[str] = ()) -> Config:
    """The options of one method or scheme. Raises UnsupportedModelError for those that are not known."""
    known = {*read, *harmless}
    for key, value in data.items():
        if key not in known and value not in (None, {}, []):
            raise UnsupportedModelError(f"{what} quantization with {key}={value!r:.80} is not supported")
    return Config(data, f"{what} quantization")


def strings(config: Config, key: str) -> list[str]:
    """A list of strings; none where the option is absent or null."""
    value = config.data.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{config.family} config: {key} is {value!r:.80}, expected a list of names")
    return value


def block_size(config: Config, key: str, size: Any) -> tuple[int, int] | None:
    """Rows and columns of a block, from a list of both; None for None."""
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in size):
        raise CheckpointError(f"{config.family} config: {key} is {size!r:.80}, expected two positive numbers")
    return size[0], size[1]


def group_size(config: Config, key: str = "group_size", default: int | None = None) -> int | None:
    """A number of columns; None for -1, where a group is a whole row."""
    if config.data.get(key, default) == -1:
        return None
    return config.integer(key, default)
