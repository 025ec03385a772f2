"""Rendering a chat template, as a program: `flashrt.text.template` runs it in a process of its own.

A template is code of strangers, and a single step of it can take any time and memory: a product of a text, a comparison
of nested lists, a wide format. So it is the kernel that bounds the memory and the processor time of this process.

Reads {"source", "variables", "memory_bytes", "cpu_s", "longest"} from stdin; without variables a template is compiled
only. Writes {"text"} to stdout, or {"error", "message"}, where the error is 'compiling', 'rejected' or 'failed'.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_MESSAGE = 500  # characters of an error: a template may raise one of any length


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """What templates find in transformers."""
    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    result.filters["tojson"] = _tojson
    result.globals["raise_exception"] = _raise_exception
    result.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return result


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """What is said of one request. Nothing that a template does raises."""
    try:
        template = environment().from_string(request["source"])
    except Exception as error:
        return _failure("compiling", error)
    if request["variables"] is None:
        return {"text": ""}
    try:
        text = template.render(request["variables"])
        if len(text) > request["longest"]:
            raise OverflowError(f"{len(text)} characters, of these messages at most {request['longest']} can be made")
        return {"text": text}
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        return _failure("rejected", error)
    except Exception as error:
        return _failure("failed", error)


def _failure(kind: str, error: Exception) -> dict[str, str]:
    """Of an error whose own text may be without bounds, too."""
    said, name = "", type(error).__name__
    try:
        said = " ".join(str(error)[: 2 * LONGEST_MESSAGE].split())[:LONGEST_MESSAGE]
    except Exception:
        said = ""
    if not isinstance(error, jinja2.TemplateError) or not said:
        said = f"{name}: {said}" if said else name
    line = _line(error)
    return {"error": kind, "message": said if line is None else f"line {line}: {said}"}


def _line(error: Exception) -> int | None:
    """The line of the template where an error arose."""
    found = getattr(error, "lineno", None)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = trace.tb_lineno
        trace = trace.tb_next
    return found


def _bound(memory_bytes: int, cpu_s: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    _bound(request["memory_bytes"], request["cpu_s"])
    sys.stdout.buffer.write(json.dumps(answer(request), ensure_ascii=False).encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    main()
