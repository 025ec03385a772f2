"""How byte-level vocabularies split text before merging, by the names that GGUF files give: llama.cpp's list.

Source: `llm_tokenizer_bpe` and `llama_vocab::impl::load` of llama.cpp's src/llama-vocab.cpp. Patterns are written as in
the models' own tokenizer.json where llama.cpp had to respell them for its engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flashrt.errors import UnsupportedModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(upper: str, lower: str, tail: str) -> str:
    """Words whose upper case letters come first, each with `tail` behind it."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{tail}|{start}{upper}+{lower}*{tail}"


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + _WORDS + r"\p{N}" + _REST
QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_TEKKEN = _cased(_UPPER, _LOWER, "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_GPT4O = _cased(_UPPER, _LOWER, _CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_YOUTU = _cased(_UPPER, _LOWER, _CONTRACTIONS + "?") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_KIMI = (
    r"\p{Han}+|"
    + _cased(_UPPER[:-1] + r"&&[^\p{Han}]]", _LOWER[:-1] + r"&&[^\p{Han}]]", _CONTRACTIONS + "?")
    + r"|\p{N}{1,3}"
    + _REST
)
_JAIS2 = (
    LLAMA3.removesuffix(r"|\s+(?!\S)|\s+")
    + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s{1}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_LINES = r"[^\n]+|[\n]+"

# Letters with case, as DeepSeek LLM's tokenizer.json counts them out.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_ASCII_MARK = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
_DEEPSEEK3 = _ASCII_MARK + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES
_SPARK = _ASCII_MARK + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + _KANA
)


@dataclass(frozen=True, slots=True)
class Split:
    """One way to split.

    patterns: regular expressions, each cuts what the ones before it left into matches and what is between them
    whole_words: a word of the vocabulary is taken as it is, whatever merges would make of it
    bos: the beginning token is put before texts where the file does not say
    nfc: characters are composed first
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False

    def pre_tokenizer(self, prefix_space: bool = False) -> dict[str, Any]:
        """As tokenizer.json has it. prefix_space: a space is put before what does not begin with one."""
        patterns = list(self.patterns)
        own = patterns[-1] == GPT2  # which the library's byte level step applies by itself
        level = {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": own}
        steps = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in (patterns[:-1] if own else patterns)
        ]
        return {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level


_LLAMA3_SPLIT = Split((LLAMA3,), whole_words=True, bos=True)
_DIGITS = Split((r"\p{N}", GPT2))
_GPT2_SPLIT = Split((GPT2,))

_BY_SPLIT: dict[Split, str] = {
    _GPT2_SPLIT: "gpt-2 gpt2 default phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert "
    "exaone4 mpt olmo jais trillion granite-docling",
    _LLAMA3_SPLIT: "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    Split((LLAMA3,)): "smaug-bpe dbrx glm4 chatglm-bpe",
    Split((QWEN2,), nfc=True): "qwen2 deepseek-r1-qwen",
    Split((QWEN2,)): "kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    Split((QWEN35,), nfc=True): "qwen35",
    Split((_TEKKEN,), whole_words=True, bos=True): "tekken",
    Split((_GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    Split((_GPT4O,), whole_words=True): "granite-embed-multi-97m",
    _DIGITS: "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    Split(("[\r\n]", rf"\s?[{_CASED_LETTERS}]+", rf"\s?[{_MARKS}]+", r"\s+$", _IDEOGRAPHS, r"\p{N}+")): "deepseek-llm",
    Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")): "deepseek-coder",
    Split((r"\p{N}{1,3}", _KANA, _DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    Split((r"\p{N}{1,3}", _KANA, _SPARK, r"\p{N}")): "spark2_5",
    Split((_YOUTU_SCRIPTS, _YOUTU), whole_words=True): "youtu",
    Split((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")): "falcon",
    Split((_BLOOM,)): "bloom poro-chat gpt3-finnish",
    Split((_BLOOM, r"\p{N}")): "viking",
    Split(
        (
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            "([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        bos=True,
    ): "chameleon",
    Split((r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)): "tiny_aya cohere2moe",
    Split((_KIMI,)): "kimi-k2",
    Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))")): "superbpe",
    Split(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+",
        )
    ): "bailingmoe bailingmoe2 llada-moe",
    Split((_CONTRACTIONS + _WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES,)): "seed-coder",
    Split((_WORDS.removeprefix("|") + r"\p{N}" + _REST,)): "ufakzeka",
    Split((_LINES, QWEN2)): "laguna",
    Split(
        (
            _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ): "exaone-moe",
    Split((r"\p{N}{1,3}", _CONTRACTIONS + _WORDS + r"\p{N}+" + _REST), whole_words=True): "minicpm5",
    Split((_JAIS2,)): "jais-2",
}
SPLITS: dict[str, Split] = {name: split for split, names in _BY_SPLIT.items() for name in names.split()}
"""Name in `tokenizer.ggml.pre` → how to split."""


def split_of(name: str) -> Split:
    """Raises UnsupportedModelError for a name that nobody told us about."""
    if name not in SPLITS:
        known = ", ".join(sorted(SPLITS))
        raise UnsupportedModelError(f"GGUF pre-tokenizer {name!r} is not supported; known: {known}")
    return SPLITS[name]
