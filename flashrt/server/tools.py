"""tools and tool_choice: functions that a model is told of, in the way of its template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from flashrt.server.deltas import calls_of
from flashrt.server.errors import invalid, refused

MOST_TOOLS = 512
CHOICES = ("none", "auto", "required")
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` binds arguments to `parameters`, their JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    function: Function
    type: str = "function"


@dataclass(frozen=True)
class Use:
    """Calls that an answer may hold: of which functions, whether it has to hold one, and whether several."""

    functions: list[Function]
    required: bool
    several: bool

    @property
    def bound(self) -> bool:
        """Whether it takes a grammar."""
        return self.required or not self.several or any(function.strict for function in self.functions)


def use_of(tools: list[Tool], choice: str | dict[str, Any] | None, several: bool) -> Use:
    """Of tools and a choice that `shown` has checked. A function that is named is called once."""
    functions = [tool.function for tool in tools]
    if isinstance(choice, dict):
        name = _chosen(choice)
        return Use([function for function in functions if function.name == name][:1], True, False)
    return Use(functions, choice == "required", several)


def shown(tools: list[Tool] | None, choice: str | dict[str, Any] | None, template: str) -> list[dict[str, Any]] | None:
    """Tools as a template reads them; None where none are given, or none shall be called. Raises ApiError."""
    if isinstance(choice, str) and choice not in CHOICES:
        raise invalid("tool_choice", f"tool_choice is {choice!r:.50}, expected {', '.join(CHOICES)} or a function")
    if not tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice asks for calls, and there are no tools")
        return None
    if isinstance(choice, dict) and _chosen(choice) not in [tool.function.name for tool in tools]:
        raise invalid("tool_choice", "tool_choice names none of the tools")
    if len(tools) > MOST_TOOLS:
        raise invalid("tools", f"tools: {len(tools)} of them, expected at most {MOST_TOOLS}")
    for i, tool in enumerate(tools):
        _check(f"tools[{i}]", tool)
    if "tools" not in template or calls_of(template) is None:
        raise refused("tools", "the model's chat template shows it none, or calls in no form that is known here")
    return None if choice == "none" else [_shown(tool.function) for tool in tools]


def _check(where: str, tool: Tool) -> None:
    if tool.type != "function":
        raise refused(f"{where}.type", "tools are functions")
    if not _NAME.fullmatch(tool.function.name):
        raise invalid(f"{where}.function.name", f"{where}.function.name: expected 1 to 128 letters, digits, _ . : or -")


def _chosen(choice: dict[str, Any]) -> Any:
    """The name in `{"type": "function", "function": {"name": ..}}`."""
    function = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refused("tool_choice", "a choice is none, auto, required, or one function by its name")
    return function["name"]


def _shown(function: Function) -> dict[str, Any]:
    parameters = function.parameters or {"type": "object", "properties": {}}
    known = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": known}
