"""Which tokens end an answer: the same union of a directory and of the GGUF file of the same vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrt.storage.sources import open_checkpoint
from flashrt.text.ends import end_ids
from tests.families import EOS, SPECIAL, TEMPLATE, USER, tiny_checkpoint, tiny_gguf, tiny_tokens

IDS = {token: i for i, token in enumerate(("</s>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<turn>", "<s>"))}
BEHIND = "{% for m in messages %}{{ m['content'] }}%s{% endfor %}"


def ends(*added: str, template: str | None = None, **special: str) -> set[str]:
    ids = {token: IDS[token] for token in added}
    return {token for token in added if ids[token] in end_ids(ids, added, template, special)}


def test_by_name() -> None:
    assert ends("</s>", "<|im_end|>", "<turn>") == {"<|im_end|>"}
    assert ends("</s>", "<|end|>", "<|return|>") == {"<|end|>", "<|return|>"}
    assert ends("<|end|>", "<|return|>", "<|call|>") == {"<|return|>", "<|call|>"}  # where it ends a channel only
    assert ends("</s>", "<turn>", eos_token="<turn>") == {"<turn>"}
    assert ends("</s>", eos_token="<nowhere>") == set()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BEHIND.replace("%s", "<turn>"), {"<turn>"}),
        (BEHIND.replace("%s", "\n <turn>\n"), {"<turn>"}),
        (BEHIND.replace("%s", " then <turn>"), set()),
        (BEHIND.replace("%s", "<s>"), set()),  # the next text's beginning
        ("{{ raise_exception('no') }}<turn>", set()),
        ("{% endfor %}<turn>", set()),
        ("<turn>{{ messages[0].content }}", set()),
    ],
)
def test_by_template(template: str, expected: set[str]) -> None:
    assert ends("</s>", "<turn>", "<s>", template=template, bos_token="<s>") == expected


def spec_ends(path: Path) -> set[int]:
    with open_checkpoint(path) as checkpoint:
        return set(checkpoint.spec.eos)


def test_directory_and_gguf_have_the_same(tmp_path: Path) -> None:
    template = TEMPLATE.replace("{{ eos_token }}", "<|user|>")
    _, directory = tiny_checkpoint("llama", tmp_path / "hf")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    metadata: dict[str, Any] = {"tokenizer.chat_template": template}
    _, gguf = tiny_gguf("llama", tmp_path / "x.gguf", metadata=metadata)
    assert spec_ends(directory) == spec_ends(gguf) == {EOS, USER}


@pytest.mark.parametrize(
    "where", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_each_file_is_heard(where: str, tmp_path: Path) -> None:
    _, directory = tiny_checkpoint("llama", tmp_path / "hf", eos_token_id=None)
    for name in ("generation_config.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    assert spec_ends(directory) == set()
    fields = {"eos_token": SPECIAL[USER]} if "token" in where else {"eos_token_id": [None, -1, USER]}
    path = directory / where
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | fields))
    assert spec_ends(directory) == {USER}


def test_ends_beyond_the_vocabulary_are_none(tmp_path: Path) -> None:
    _, directory = tiny_checkpoint("llama", tmp_path / "hf", eos_token_id=[EOS, 5000])
    assert spec_ends(directory) == {EOS}
    assert len(tiny_tokens()[0]) < 5000
