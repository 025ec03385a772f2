"""Chat templates: Jinja source from a checkpoint, rendered exactly as transformers does, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from flashrt import child
from flashrt.errors import CheckpointError, UsageError
from flashrt.text.files import TextFiles

# Bounds for the code of a template. A common one takes 12 MiB, nearly all of it Python's and Jinja's own, and 0.1 s.
MEMORY_BYTES = 64 << 20
CPU_S = 4
LONGEST = 1 << 20  # characters of a text
# What each byte of a conversation may add to memory, and to the text: it is copied, and escaped.
MEMORY_GROWTH, GROWTH = 16, 8


class ChatTemplate:
    """A template's source. `special_tokens` (bos_token, ...) are visible to it by name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source, self.special_tokens = source, dict(special_tokens)

    @classmethod
    def from_text(cls, text: TextFiles) -> ChatTemplate:
        """Raises UsageError for a base model, which has no template."""
        if text.chat_template is None:
            raise UsageError("the model has no chat template (it is a base model): give it a plain prompt instead")
        return cls(text.chat_template, text.special_tokens)

    def check(self) -> None:
        """Raises CheckpointError when it cannot be compiled, for those who render only later."""
        self._run(None)

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of a conversation: messages of {'role': ..., 'content': ...}, of values that JSON can express.

        Raises UsageError when the template rejects them (roles that must alternate, say); CheckpointError when it
        cannot be compiled, fails, or would take more time, memory or text than a template may.
        """
        known = {"tools": None, "documents": None, **self.special_tokens, **variables}
        conversation = [dict(message) for message in messages]
        return self._run(known | {"messages": conversation, "add_generation_prompt": add_generation_prompt})

    def _run(self, variables: dict[str, Any] | None) -> str:
        size = len(_encoded(variables))
        request = {
            "source": self.source,
            "variables": variables,
            "memory_bytes": MEMORY_BYTES + MEMORY_GROWTH * size,
            "cpu_s": CPU_S,
            "longest": LONGEST + GROWTH * size,
        }
        done = subprocess.run(
            child.command("flashrt.text.render"), input=_encoded(request), capture_output=True, check=False
        )
        if done.returncode:
            raise CheckpointError(f"the model's chat template cannot be used: {_end(done)}")
        answer = json.loads(done.stdout.decode("utf-8", "surrogatepass"))
        match answer.get("error"):
            case None:
                return str(answer["text"])
            case "rejected":
                raise UsageError(f"the model's chat template rejects these messages: {answer['message']}")
            case "compiling":
                raise CheckpointError(f"the model's chat template cannot be compiled: {answer['message']}")
            case _:
                raise CheckpointError(f"the model's chat template fails: {answer['message']}")


def _encoded(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a chat template takes what JSON can express: {error}") from None


def _end(done: subprocess.CompletedProcess[bytes]) -> str:
    """How a process ended that said nothing."""
    if done.returncode == -signal.SIGXCPU:
        return f"it computes for more than {CPU_S} seconds"
    if done.returncode < 0:
        return f"its process was ended by {signal.Signals(-done.returncode).name}"
    return (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it ended without a word"])[-1]
