"""Chat templates render as transformers renders them."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashrt.errors import CheckpointError, UsageError
from flashrt.storage.sources import open_checkpoint
from flashrt.text.files import TextFiles
from flashrt.text.template import ChatTemplate
from flashrt.text.tokenizer import Tokenizer
from tests.families import tiny_checkpoint, tokenizer_json

MESSAGES = [{"role": "user", "content": "Hi <b>&</b>"}, {"role": "assistant", "content": "naïve"}]
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}\n    {% if loop.index0 == 0 %}\n  first\n    {% continue %}{% endif %}\n"
    "{{ m | tojson }}\n{% endfor %}",
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- endfor -%}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ tools is none }}",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))[1]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_as_transformers(source: str, prompt: bool, directory: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    ours = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    expected = theirs.apply_chat_template(MESSAGES, chat_template=source, add_generation_prompt=prompt, tokenize=False)
    assert ours.render(MESSAGES, add_generation_prompt=prompt) == expected


def test_checkpoint_template(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        tokenizer = Tokenizer.from_text(checkpoint.text)
    assert tokenizer.chat_template.render(MESSAGES[:1]) == "<s><|user|>Hi <b>&</b></s>"


def test_base_model_has_no_template() -> None:
    with pytest.raises(UsageError, match="base model"):
        _ = Tokenizer.from_text(TextFiles(tokenizer_json())).chat_template


def test_errors_and_sandbox() -> None:
    with pytest.raises(CheckpointError, match="compiled"):
        ChatTemplate("{% for %}", {})
    with pytest.raises(UsageError, match="alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render([])
    with pytest.raises(UsageError):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).render([])
    with pytest.raises(UsageError):
        ChatTemplate("{{ messages.append(1) }}", {}).render([])
    assert len(ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])) == 4
