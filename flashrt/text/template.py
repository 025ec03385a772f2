"""Chat templates: Jinja source from a checkpoint, rendered in a sandbox, exactly as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from flashrt.errors import CheckpointError, UsageError
from flashrt.text.files import TextFiles


class ChatTemplate:
    """A compiled template. `special_tokens` (bos_token, ...) are visible to it by name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        from jinja2 import TemplateError

        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template cannot be compiled: {error}") from error

    @classmethod
    def from_text(cls, text: TextFiles) -> ChatTemplate:
        if text.chat_template is None:
            raise UsageError("the model has no chat template (it is a base model): give it a plain prompt instead")
        return cls(text.chat_template, text.special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation: messages of {'role': ..., 'content': ...}.

        Raises UsageError when the template rejects them (roles that must alternate, say).
        """
        from jinja2 import TemplateError

        known: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens, **variables}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **known
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UsageError(f"the model's chat template rejects these messages: {error}") from error


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what an assistant said, for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012 - the attribute is jinja2's

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
