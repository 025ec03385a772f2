"""Which tokens end an answer: what the files name, what is known by its spelling, and what the chat template writes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from flashrt.errors import FlashrtError
from flashrt.text.template import ChatTemplate

# llama.cpp's `special_eog_ids` (src/llama-vocab.cpp), without those that only a file's own word makes an end.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_utterance>",
    "<turn|>",
    "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_CHANNEL_END = "<|end|>"  # ends a channel, not an answer, where another token ends these
_ANSWER_ENDS = ({"<|return|>", "<|call|>"}, {"<|calls|>", "<|flush|>"})
_QUESTION, _ANSWER = "Question", "Unmistakable answer"


def end_ids(
    ids: Mapping[str, int], added: Iterable[str], template: str | None, special: Mapping[str, str]
) -> tuple[int, ...]:
    """Ids of the tokens after which an answer is over, beside those that a configuration gives by number.

    ids: every token whose id is known; added: those that stand for themselves in a text
    template, special: the chat template, and what it may name
    """
    found = [name for name in END_TOKENS if name in ids]
    if any(ends <= set(found) for ends in _ANSWER_ENDS) and _CHANNEL_END in found:
        found.remove(_CHANNEL_END)
    found.append(special.get("eos_token", ""))
    if template is not None:
        found.append(_written(template, tuple(sorted(special.items())), frozenset(added)))
    return tuple(dict.fromkeys(ids[name] for name in found if name in ids))


@functools.lru_cache(maxsize=64)
def _written(template: str, special: tuple[tuple[str, str], ...], added: frozenset[str]) -> str:
    """The token that a template writes right behind an answer; '' where it writes none, or cannot be rendered."""
    names = dict(special)
    if not any(token in template for token in added - set(names.values())):
        return ""  # it can only write tokens that have names
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = ChatTemplate(template, names).render(messages, add_generation_prompt=False)
    except FlashrtError:
        return ""  # said when somebody wants to chat
    rest = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
    behind = [token for token in added if token and rest.startswith(token) and token != names.get("bos_token")]
    return max(behind, key=len, default="")
