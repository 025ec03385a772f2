"""Tokenizers of real GGUF files against transformers' own conversion. Needs FLASHRT_MODELS (a directory)."""

from __future__ import annotations

import os
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flashrt.storage.sources import open_checkpoint
from flashrt.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import TEXTS, stream_text

pytestmark = pytest.mark.slow

QWEN = "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
MORE = (
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "<start_of_turn>user\nHi<end_of_turn>\n",
    "   leading, trailing   ",
    "x" * 300,
    "a\u00a0b\u2028c\u200bd",
    "It's we'll I'M they'Ve  don't",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 עברית العربية हिन्दी ไทย 한국어 にほんご",
    '<div class="a">\n\t\t<p>text</p>\n</div>\r\n\r\n',
    "┌──┐│░▒▓ ∑∫√ \x00\x07",
    "[INST] <<SYS>> <unused5> <pad> <bos> </s>",
)


def model_path(name: str) -> Path:
    directory = os.environ.get("FLASHRT_MODELS")
    if not directory or not (Path(directory) / name).exists():
        pytest.skip(f"FLASHRT_MODELS holds no {name}")
    return Path(directory) / name


@cache
def both(name: str) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    path = model_path(name)
    with open_checkpoint(path) as checkpoint:
        ours = Tokenizer.from_text(checkpoint.text)
    return ours, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("name", [QWEN, GEMMA])
@pytest.mark.timeout(600)
def test_as_transformers(name: str) -> None:
    model_path(name)
    ours, theirs = both(name)
    code = Path(os.__file__).read_text()[:20000]
    for text in (*TEXTS, *MORE, code):
        # Qwen's own tokenizer normalizes to NFC, which transformers' conversion from GGUF leaves out.
        normal = unicodedata.normalize("NFC", text) if name == QWEN else text
        ids = ours.encode(text)
        assert ids == theirs(normal)["input_ids"], repr(text[:60])
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
        assert stream_text(ours, ids) == ours.decode(ids)


@pytest.mark.timeout(600)
def test_qwen_template_as_transformers() -> None:
    model_path(QWEN)
    ours, theirs = both(QWEN)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Größe? <b>"}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"où": "Zürich"}}}
    called = [
        *messages,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21 °C"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
    for conversation, options in ((messages, None), (messages[1:], None), (called, tools)):
        expected = theirs.apply_chat_template(conversation, tools=options, add_generation_prompt=True, tokenize=False)
        assert ours.chat_template.render(conversation, tools=options) == expected
