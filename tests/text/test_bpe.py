"""tokenizer.json built from vocabularies and merges, against transformers' own conversions."""

from __future__ import annotations

import json
from array import array
from typing import Any

import numpy as np
import pytest

from flashrt.errors import CheckpointError
from flashrt.text.bpe import SentencePieces, byte_alphabet, byte_level, derive_merges, sentencepiece
from flashrt.text.files import TextFiles
from flashrt.text.gguf import text_from_gguf
from flashrt.text.splits import SPLITS
from flashrt.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import TEXTS

MERGES = ["Ġ t", "h e", "Ġt he", "l l", "1 2", "12 3", "Ċ Ċ", "' s", "Ġ Ġ", "Ġ w", "o r", "Ġw or"]


def vocabulary() -> list[str]:
    return [*byte_alphabet(), *("".join(merge.split(" ")) for merge in MERGES), "<|end|>", "<think>"]


def kinds() -> list[int]:
    return [1] * (256 + len(MERGES)) + [3, 4]


def known_to_transformers() -> list[str]:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return sorted({"gpt-2", "default", *GGUF_PRE_TOKENIZER_SPLITS})


# Splits that transformers does not know, by their effect on one text: pieces as llama.cpp's patterns give them, one
# pattern after the other on what those before it left.
SAMPLE = "It's 12345 a+b\r\n\n  x_1 caf\u00e9 \u65e5\u672c"
PIECES = {
    "smollm": "It|'s| |1|2|3|4|5| a|+|b|\r\n\n | x|_|1| caf\u00e9| \u65e5\u672c",
    "starcoder": "It|'s| |1|2|3|4|5| a|+|b|\r\n\n | x|_|1| caf\u00e9| \u65e5\u672c",
    "deepseek-llm": "It|'|s| |12345| a|+|b|\r|\n|\n| | x|_|1| caf|\u00e9| |\u65e5\u672c",
    "deepseek-coder": "It|'|s| |1|2|3|4|5| a|+|b|\r|\n|\n| | x|_|1| caf\u00e9| |\u65e5\u672c",
    "deepseek-v3": "It|'s| |123|45| a|+b|\r\n\n| | x|_|1| caf\u00e9| |\u65e5\u672c",
    "seed-coder": "It|'s| |1|2|3|4|5| a|+b|\r\n\n| | x|_|1| caf\u00e9| \u65e5\u672c",
    "superbpe": "It's |12|345| a+b\r\n\n  x_|1| caf\u00e9 \u65e5\u672c",
    "tiny_aya": "It's| |12|345| a|+b|\r\n\n| | x|_|1| caf\u00e9| \u65e5\u672c",
    "bloom": "It's| 12345| a+b|\r\n\n | x_1| caf\u00e9| \u65e5\u672c",
    "viking": "It's| |1|2|3|4|5| a+b|\r\n\n | x_|1| caf\u00e9| \u65e5\u672c",
    "falcon": "It|'|s| |123|45| a|+|b|\r\n\n | x|_|1| caf\u00e9| \u65e5\u672c",
    "kimi-k2": "It's| |123|45| a|+b|\r\n\n| | x|_|1| caf\u00e9| |\u65e5\u672c",
    "chameleon": "It|'|s| |1|2|3|4|5| a|+|b|\r|\n|\n|  |x|_|1| caf\u00e9| \u65e5\u672c",
}


@pytest.mark.parametrize("pre", known_to_transformers())
def test_byte_level_as_transformers(pre: str) -> None:
    from transformers.integrations.gguf import convert_gguf_tokenizer

    tokens = vocabulary()
    fields = {"tokens": tokens, "merges": MERGES, "token_type": kinds()}
    theirs, _ = convert_gguf_tokenizer("llama", {"tokenizer_type": "gpt2", "pre_tokenizer_type": pre, **fields})
    ours = Tokenizer.from_text(TextFiles(byte_level(tokens, MERGES, kinds(), pre)))
    mixed = (
        "the 12345 worlds' IT'S  \n\n\t x<|end|>y<think>z</think>",
        "\u00e9t\u00e9 12 \u00bd \u2167",
        "a\r\nb\r\n\r\n c",
    )
    for text in (*TEXTS, *mixed):
        if "e\u0301" in text:
            continue  # Qwen's own tokenizer composes characters, the conversion does not
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("pre", PIECES)
def test_splits_as_llama_cpp(pre: str) -> None:
    from tokenizers import Tokenizer as Backend

    data = byte_level([*byte_alphabet()], [], [1] * 256, pre)
    found = Backend.from_str(data.decode()).pre_tokenizer.pre_tokenize_str(SAMPLE)
    assert "|".join(SAMPLE[start:stop] for _, (start, stop) in found) == PIECES[pre]


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_every_split_covers_every_text(pre: str) -> None:
    tokens = [*byte_alphabet()]
    ours = Tokenizer.from_text(TextFiles(byte_level(tokens, [], [1] * 256, pre)))
    for text in (*TEXTS, SAMPLE):
        if "e\u0301" not in text:
            assert ours.decode(ours.encode(text)) == text


def test_bos_comes_from_the_post_processor() -> None:
    tokens = vocabulary()
    end = tokens.index("<|end|>")
    ours = Tokenizer.from_text(TextFiles(byte_level(tokens, MERGES, kinds(), "llama-bpe", bos=end)))
    assert ours.encode("the")[0] == end
    assert ours.encode("the", special=False)[0] != end


def random_vocabulary(seed: int) -> tuple[list[str], list[float]]:
    generator = np.random.default_rng(seed)
    words = {"".join(generator.choice(list("abc▁"), generator.integers(1, 6))) for _ in range(120)}
    tokens = ["<unk>", *"abc▁", *sorted(words - set("abc▁"))]
    scores = generator.permutation(len(tokens)).astype(float) // 2  # with ties
    return tokens, (-scores).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_derived_merges_as_transformers(seed: int) -> None:
    from transformers.tokenization_utils_base import generate_merges

    tokens, scores = random_vocabulary(seed)
    vocab = {token: i for i, token in enumerate(tokens)}
    assert derive_merges(vocab, scores, tokens) == generate_merges(vocab, dict(zip(tokens, scores, strict=True)))


@pytest.mark.parametrize("seed", range(4))
def test_sentencepiece_as_transformers(seed: int) -> None:
    from transformers.integrations.gguf import convert_gguf_tokenizer

    words, scores = random_vocabulary(seed)
    tokens = [*words, *(f"<0x{b:02X}>" for b in range(256))]
    fields: dict[str, Any] = {
        "tokens": tokens,
        "scores": scores + [-1e4] * 256,
        "token_type": [2] + [1] * (len(tokens) - 1),
    }
    theirs, _ = convert_gguf_tokenizer("llama", {"tokenizer_type": "llama", **fields})
    ours = Tokenizer.from_text(TextFiles(sentencepiece(tokens, fields["scores"], fields["token_type"])))
    generator = np.random.default_rng(seed)
    for _ in range(30):
        text = "".join(generator.choice(list("aaabbbccc  \né"), 20)).lstrip()
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


def test_no_prefix_space() -> None:
    words, scores = random_vocabulary(0)
    data = sentencepiece(words, scores, [2] + [1] * (len(words) - 1), rules=SentencePieces(prefix="never"))
    assert Tokenizer.from_text(TextFiles(data)).decode(Tokenizer.from_text(TextFiles(data)).encode("a b")) == "a b"
    assert "Prepend" not in json.dumps(json.loads(data))


def test_gemma_4s_vocabulary_as_llama_cpp_reads_it() -> None:
    """Whole characters are merged, spaces are a character, and what is unknown falls back to bytes."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"he\n▁"]
    words += ["he", "▁he", "▁▁", "\n\n", "<|turn>", "<|channel>"]
    metadata: dict[str, Any] = {
        "general.architecture": "gemma4",
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.merges": ["h e", "▁ he", "▁ ▁", "\n \n"],
        "tokenizer.ggml.scores": array("f", [0.0] * len(words)),
        "tokenizer.ggml.token_type": array("i", [3, 3, 3, 2] + [6] * 256 + [1] * 8 + [3, 4]),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    ours = Tokenizer.from_text(text_from_gguf(metadata))
    text = "<|turn>he  he\n\n\nhe é<|channel>"
    expected = ["<bos>", "<|turn>", "he", "▁", "▁he", "\n\n", "\n", "he", "▁", "<0xC3>", "<0xA9>", "<|channel>"]
    ids = ours.encode(text)
    assert [words[i] for i in ids] == expected
    assert ours.decode(ids) == text.removeprefix("<|turn>")  # control tokens are not shown
    del metadata["tokenizer.ggml.merges"]
    with pytest.raises(CheckpointError, match=r"gemma4 tokenizer without tokenizer.ggml.merges"):
        text_from_gguf(metadata)
