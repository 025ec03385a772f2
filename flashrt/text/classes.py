"""Tokenizer classes of transformers 5: which one a checkpoint gets, and what it brings along.

A tokenizer.json says everything by itself but for special tokens that a class adds. vocab.json and merges.txt say
nothing of how text is split: that is the class's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flashrt.errors import UnsupportedModelError
from flashrt.text.splits import GPT2, QWEN2, QWEN35, Split

_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """special: named tokens that the class has where nothing else is said
    split: how text is split; None where the class reads no vocab.json
    resets: special tokens lose what else is said of them, such as that spaces beside them belong to them
    """

    special: Mapping[str, str] = field(default_factory=dict)
    split: Split | None = None
    resets: bool = False


_GPT2 = TokenizerClass({"bos_token": _END, "eos_token": _END, "unk_token": _END}, Split((GPT2,)))
_QWEN = {"eos_token": _END, "unk_token": _END, "pad_token": _END}
CLASSES: dict[str, TokenizerClass] = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": TokenizerClass({**_GPT2.special, "pad_token": "<|padding|>"}, Split((GPT2,), nfc=True)),
    "Qwen2Tokenizer": TokenizerClass(_QWEN, Split((QWEN2,), nfc=True), resets=True),
    "Qwen3_5Tokenizer": TokenizerClass(_QWEN, Split((QWEN35,), nfc=True)),
    "LlamaTokenizer": TokenizerClass({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "GemmaTokenizer": TokenizerClass(
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        }
    ),
}
_OF_MODELS = {
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "opt": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
_WHATEVER_IS_NAMED = ("qwen2",)  # models whose checkpoints name wrong classes: transformers takes its own


def class_name(model_type: str, named: str | None) -> str | None:
    """The class of a checkpoint whose tokenizer_config.json names `named`; None where nothing names one."""
    if named is None or model_type in _WHATEVER_IS_NAMED:
        return _OF_MODELS.get(model_type)
    return named.removesuffix("Fast")


def split_of_class(name: str | None) -> Split:
    """How the class splits text that has vocab.json and merges.txt only. Raises UnsupportedModelError."""
    found = CLASSES.get(name or "", TokenizerClass()).split
    if found is None:
        known = ", ".join(sorted(name for name, known in CLASSES.items() if known.split is not None))
        raise UnsupportedModelError(
            f"vocab.json and merges.txt without tokenizer.json: how {name or 'its class'} splits text is not known, "
            f"only: {known}. Load the tokenizer with transformers and save it, which writes tokenizer.json"
        )
    return found
