"""tekken.json: Mistral's byte-level vocabulary, tokens by rank as tiktoken has them, as tokenizer.json.

Source: `Tekkenizer` of mistral_common. Special tokens come first; a token's rank is its place in the merging order.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from flashrt.errors import CheckpointError, UnsupportedModelError
from flashrt.text.bpe import byte_alphabet, byte_level_files
from flashrt.text.splits import Split


def tekken_tokenizer(document: Mapping[str, Any]) -> bytes:
    """tokenizer.json of a parsed tekken.json. Raises CheckpointError when it is damaged."""
    try:
        config, special = document["config"], _special_tokens(document)
        size = config.get("default_vocab_size")
        entries = document["vocab"] if size is None else document["vocab"][: size - len(special)]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): i for i, entry in enumerate(entries)}
        if len(ranks) != len(entries) or [entry["rank"] for entry in entries] != list(range(len(entries))):
            raise ValueError("its vocabulary is not in the order of ranks")
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"tekken.json is damaged: {error}") from error
    spelling = byte_alphabet()
    spelled = {token: "".join(spelling[byte] for byte in token) for token in ranks}
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {spelled[token]: rank + len(special) for token, rank in ranks.items()}
    if len(vocab) != len(special) + len(ranks):
        raise CheckpointError("tekken.json is damaged: a special token is also a word")
    merges = [(spelled[left], spelled[right]) for left, right in _merges(ranks)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": i, "content": token, **flags} for i, token in enumerate(special)]
    return byte_level_files(vocab, merges, Split((pattern,), whole_words=True), added=added)


def special_of(document: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like of a tekken.json that `tekken_tokenizer` has read."""
    held = set(_special_tokens(document))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return {name: token for name, token in names.items() if token in held}


def _special_tokens(document: Mapping[str, Any]) -> list[str]:
    entries, config = document.get("special_tokens"), document["config"]
    if entries is None:
        raise UnsupportedModelError(
            "tekken.json names no special tokens (it is of an early version): convert it to tokenizer.json"
        )
    named = sorted((entry["rank"], str(entry["token_str"])) for entry in entries)
    if [rank for rank, _ in named] != list(range(len(named))):
        raise ValueError("its special tokens are not numbered from 0")
    count = config.get("default_num_special_tokens")
    count = len(named) if count is None else int(count)
    if not len(named) <= count <= 1 << 20:
        raise ValueError(f"it has {len(named)} special tokens, and says {count}")
    return [token for _, token in named] + [f"<SPECIAL_{i}>" for i in range(len(named), count)]


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs of tokens that make a token, in the order of what they make."""
    result = []
    for token in ranks:  # in the order of ranks
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        result += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return result
