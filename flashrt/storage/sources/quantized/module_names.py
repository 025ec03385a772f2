"""Names of modules in configurations: as they are, or as regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flashrt.errors import CheckpointError

REGEX = "re:"  # begins a regular expression, in configurations of compressed-tensors
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")


class Exempt:
    """The modules that `modules_to_not_convert` names.

    As transformers matches them: the start of a name up to a dot, or its end. Raises CheckpointError for what is no
    regular expression.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._ends = tuple(patterns)
        self._starts = [_compiled(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", pattern) for pattern in patterns]

    def refuse(self, module: str) -> None:
        """Raises CheckpointError for a quantized module that is among them."""
        if module.endswith(self._ends) or any(start.match(module) for start in self._starts):
            raise CheckpointError(f"{module} is stored quantized, and modules_to_not_convert names it")


class Targets:
    """Modules by name, or by a pattern that their name begins with; see `REGEX`.

    Raises CheckpointError for what is no regular expression.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        self._names, self._patterns = set[str](), dict[str, re.Pattern[str]]()
        for target in targets:
            if target.startswith(REGEX):
                self._patterns[target] = _compiled(target.removeprefix(REGEX), target)
            else:
                self._names.add(target)

    def naming(self, module: str) -> str | None:
        """The target that names a module: a name before a pattern, among patterns the first in order; None for none."""
        if module in self._names:
            return module
        return min((target for target, pattern in self._patterns.items() if pattern.match(module)), default=None)

    def __contains__(self, name: str) -> bool:
        """Whether a target is this very word."""
        return name in self._names


def _compiled(pattern: str, given: str) -> re.Pattern[str]:
    if _REPEATED_GROUP.search(pattern):  # matching may take time that is exponential in the length of a name
        raise CheckpointError(f"quantization config: {given!r:.80} repeats a group, which is not supported")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"quantization config: {given!r:.80} is no regular expression: {error}") from None
