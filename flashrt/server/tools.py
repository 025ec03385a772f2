"""tools and tool_choice: functions that a model is told of, in the way of its template."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from flashrt.server.deltas import calls_of
from flashrt.server.errors import invalid, refused

MOST_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Function(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` would bind arguments to their schema: that is refused."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    function: Function
    type: str = "function"


def shown(tools: list[Tool] | None, choice: str | dict[str, Any] | None, template: str) -> list[dict[str, Any]] | None:
    """Tools as a template reads them; None where none are given, or none shall be called. Raises ApiError."""
    if choice not in (None, "none", "auto"):
        raise refused(
            "tool_choice", "a model cannot be made to call: 'auto' lets it, 'none' does not show it the tools"
        )
    if not tools:
        if choice == "auto":
            raise invalid("tool_choice", "tool_choice is auto, and there are no tools")
        return None
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
    if tool.function.strict:
        raise refused(f"{where}.function.strict", "arguments are as the model writes them")


def _shown(function: Function) -> dict[str, Any]:
    parameters = function.parameters or {"type": "object", "properties": {}}
    known = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": known}
