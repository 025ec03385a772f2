"""Made-up checkpoints as people have them: configurations, tokenizers and GGUF metadata, varied at random by a seed.

Each variation is small and whole: files in a directory that transformers, or the gguf package, reads as well.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from flashrt.text.bpe import byte_alphabet
from tests.families import FAMILIES, VOCAB, tiny_model, write_tokenizer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<unk>", "<pad>", "<think>", "<tool>")
WORDS = (
    "the",
    "then",
    " in",
    "12",
    "123",
    "  ",
    "\n\n",
    "'s",
    "ing",
    "\u00e9",
    "e\u0301",
    "IT'S",
    "\t",
    "x_1",
    "+=",
    "\u65e5",
)
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def a_text(choose: random.Random, extra: tuple[str, ...] = SPECIAL) -> str:
    """Words, spaces and special tokens in any order."""
    pieces = choose.choices((*WORDS, *extra, " ", "a"), k=choose.randint(0, 9))
    return choose.choice(("", " ")).join(pieces)


# --- tokenizers ---


def tokenizer_directory(choose: random.Random, directory: Path) -> str:
    """Write a config.json and files of text; return what was varied."""
    directory.mkdir()
    model_type, kind, named = choose.choice(_TEXTS)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    vocab, merges = _vocabulary(choose)
    held = choose.sample(SPECIAL, choose.randint(0, 5))  # specials that lie in the vocabulary itself
    vocab |= {token: len(vocab) + i for i, token in enumerate(held)}
    added = _flags(choose, held, {token: vocab[token] for token in held})
    if kind == "whole":
        document = _document(choose, vocab, merges, added)
        (directory / "tokenizer.json").write_text(json.dumps(document))
    else:
        (directory / "vocab.json").write_text(json.dumps(vocab))
        head = choose.choice(("#version: 0.2\n", "#version: 0.2 - Trained by `huggingface/tokenizers`\n"))
        (directory / "merges.txt").write_text(head + "".join(f"{a} {b}\n" for a, b in merges))
    _companions(choose, directory, vocab, named)
    return f"{model_type} {kind} {named}"


_TEXTS = [
    ("llama", "whole", "PreTrainedTokenizerFast"),
    ("llama", "whole", "TokenizersBackend"),
    ("llama", "whole", "LlamaTokenizerFast"),
    ("mistral", "whole", "PreTrainedTokenizerFast"),
    ("qwen3", "whole", "PreTrainedTokenizerFast"),
    ("gemma3_text", "whole", "PreTrainedTokenizerFast"),
    ("llama", "whole", None),
    ("qwen2", "split", "Qwen2Tokenizer"),
    ("qwen2", "split", "GPT2Tokenizer"),
    ("qwen2", "split", None),
    ("qwen3", "split", "Qwen2TokenizerFast"),
    ("qwen3", "split", None),
    ("opt", "split", "GPT2Tokenizer"),
    ("opt", "split", None),
    ("llama", "split", "GPT2TokenizerFast"),
    ("llama", "split", "CodeGenTokenizer"),
    ("llama", "split", "GPTNeoXTokenizer"),
    ("llama", "split", "PreTrainedTokenizerFast"),
    ("mistral", "split", "RobertaTokenizer"),
]


def _vocabulary(choose: random.Random) -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = list(byte_alphabet())
    choose.shuffle(letters)
    vocab = {letter: i for i, letter in enumerate(letters)}
    spelled = ["".join(byte_alphabet()[byte] for byte in word.encode()) for word in (*WORDS, " the", " a", " 1")]
    merges: list[tuple[str, str]] = []
    for word in choose.choices(spelled, k=24):
        for cut in range(2, len(word) + 1):
            if word[:cut] not in vocab and word[: cut - 1] in vocab:
                merges.append((word[: cut - 1], word[cut - 1]))
                vocab[word[:cut]] = len(vocab)
    return vocab, merges


def _flags(choose: random.Random, tokens: list[str], ids: dict[str, int]) -> list[dict[str, Any]]:
    result = []
    for token in tokens:
        special = choose.random() < 0.7
        flags = {name: choose.random() < 0.2 for name in ("lstrip", "rstrip", "single_word")}
        normalized = choose.random() < 0.3 and not special
        result.append({"id": ids[token], "content": token, **flags, "normalized": normalized, "special": special})
    return result


def _document(
    choose: random.Random, vocab: dict[str, int], merges: list[tuple[str, str]], added: list[dict[str, Any]]
) -> dict[str, Any]:
    post = None
    special = [token for token in added if token["special"]]
    if special and choose.random() < 0.5:
        token = choose.choice(special)
        start, whole = {"SpecialToken": {"id": token["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        ids = {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
        pair = [start, whole, {"Sequence": {"id": "B", "type_id": 1}}]
        single = choose.choice(([start, whole], [whole, start]))
        post = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {token["content"]: ids}}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": choose.choice((None, {"type": "NFC"})),
        "pre_tokenizer": choose.choice((LEVEL, {"type": "Sequence", "pretokenizers": [digits, LEVEL]})),
        "post_processor": choose.choice((post, {"type": "ByteLevel", **LEVEL})) if post is None else post,
        "decoder": LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }


def _companions(choose: random.Random, directory: Path, vocab: dict[str, int], named: str | None) -> None:
    """tokenizer_config.json and its older companions, with tokens that only they have."""
    config: dict[str, Any] = {} if named is None else {"tokenizer_class": named}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if choose.random() < 0.6:
            token = choose.choice(SPECIAL)
            config[name] = choose.choice((token, None, {"__type": "AddedToken", "content": token, "lstrip": False}))
    for name in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        if choose.random() < 0.4:
            config[name] = choose.random() < 0.7
    fresh = [token for token in SPECIAL if token not in vocab][: choose.randint(0, 4)]
    start = len(vocab) + (3 if choose.random() < 0.15 else 0)  # at times with a gap, which nobody can honour
    ids = {token: start + i for i, token in enumerate(fresh)}
    way = choose.choice(("decoder", "decoder", "file", "list", "none"))
    if way == "decoder":
        entries = _flags(choose, fresh, ids)
        config["added_tokens_decoder"] = {str(entry.pop("id")): entry for entry in entries}
    elif way == "file":
        (directory / "added_tokens.json").write_text(json.dumps(ids))
    elif way == "list":
        config[choose.choice(("additional_special_tokens", "extra_special_tokens"))] = fresh
    if choose.random() < 0.3:
        special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "normalized": False}}
        (directory / "special_tokens_map.json").write_text(json.dumps(special))
    if choose.random() < 0.9 or (directory / "tokenizer.json").exists():
        (directory / "tokenizer_config.json").write_text(json.dumps(config))


# --- configurations ---

_ROPES: tuple[dict[str, Any], ...] = (
    {},
    {"rope_theta": 5000.0},
    {"rope_scaling": None, "rope_theta": 1000},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 3}, "rope_theta": 1000.0},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    {"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 64},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 900.0, "truncate": False}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.9}},
    {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
    {"rope_scaling": {"rope_type": "ntk-by-nobody", "factor": 2.0}},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5}},
)
_CHANGES: tuple[dict[str, Any], ...] = (
    {"attention_bias": True},
    {"attention_bias": None},
    {"head_dim": 16},
    {"head_dim": None},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": None},
    {"num_key_value_heads": 1},
    {"hidden_act": "gelu"},
    {"hidden_act": "gelu_pytorch_tanh"},
    {"hidden_act": "relu"},
    {"hidden_act": "quick_gelu"},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": None},
    {"rms_norm_eps": 1e-3},
    {"rms_norm_eps": 1},
    {"sliding_window": 5},
    {"sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {"use_sliding_window": False, "sliding_window": 5},
    {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4},
    {"mlp_bias": True},
    {"mlp_bias": False},
    {"bos_token_id": None, "eos_token_id": [1, 2]},
    {"eos_token_id": -1},
    {"pretraining_tp": 1, "use_cache": False, "attention_dropout": 0.0, "initializer_range": 0.1},
    {"torch_dtype": "bfloat16"},
    {"final_logit_softcapping": 5.0},
    {"attn_logit_softcapping": 5.0},
)
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
_FIELDS: tuple[dict[str, Any], ...] = (  # changed where a family has them
    {"norm_topk_prob": True},
    {"norm_topk_prob": False},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 5},
    {"n_group": 3, "topk_group": 2},
    {"n_group": 1, "topk_group": 1},
    {"n_group": None},
    {"routed_scaling_factor": 2.5},
    {"routed_scaling_factor": 1},
    {"n_shared_experts": 1},
    {"n_shared_experts": 0},
    {"moe_num_shared_experts": 0},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 9},
    {"scoring_func": "softmax"},
    {"topk_method": "greedy"},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [0]},
    {"mlp_only_layers": [1, 2]},
    {"shared_expert_intermediate_size": 40},
    {"shared_intermediate_size": 0},
    {"use_qk_norm": False},
    {"clip_qkv": 0.05},
    {"logits_scaling": 3.0},
    {"attention_multiplier": 0.3},
    {"residual_multiplier": 0.4},
    {"embedding_multiplier": 5.0},
    {"logit_scale": 0.3},
    {"layer_norm_eps": 1e-2},
    {"no_rope_layers": [1, 0, 1]},
    {"attn_temperature_tuning": False},
    {"floor_scale": 8},
    {"moe_layers": [0]},
    {"interleave_moe_layer_step": 2},
    {"moe_layer_start_index": 1},
    {"moe_layer_interval": 2},
    {"swiglu_limit": 2.0},
    {"num_local_experts": 7},
    {"query_pre_attn_scalar": 30},
    {"use_bidirectional_attention": True},
    {"use_bias": True},
    {"linear_conv_kernel_dim": 3},
    {"linear_num_value_heads": 2},
    {"do_layer_norm_before": False},
    {"activation_function": "gelu"},
)
# The first is none of transformers'. Of the second transformers scales by a text's length, flashrt by its context.
_FAMILIES = tuple(family for family in FAMILIES if family not in ("llama-fatrelu", "phi3-longrope"))
_DERIVED = {"layer_types": ("layer_types", "no_rope_layers"), "rope_parameters": ("rope_scaling", "rope_theta")}


def model_directory(choose: random.Random, directory: Path) -> str:
    """Write a tiny model whose config.json was edited as people edit it; return what was varied.

    Raises whatever transformers raises of a configuration that it cannot build.
    """
    import transformers

    family = choose.choice((choose.choice(_PLAIN), choose.choice(_FAMILIES)))
    base = tiny_model(family).config.to_dict()
    config, changes = _plain(choose, family, base) if family in _PLAIN else _of_family(choose, base)
    config |= changes
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    built = tiny_model(family, choose.randint(0, 99), config=transformers.AutoConfig.from_pretrained(directory))
    built.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return f"{family} {changes}"


def _plain(choose: random.Random, family: str, base: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    changes: dict[str, Any] = dict(choose.choice(_ROPES))
    for change in choose.choices(_CHANGES, k=choose.randint(0, 3)):
        changes |= change
    dropped = ("rope_parameters", "rope_scaling", "layer_types", "head_dim", "dtype", "architectures")
    config = {key: value for key, value in base.items() if key not in dropped}
    return config | ({} if family == "qwen2" else {"head_dim": 20}), changes


def _of_family(choose: random.Random, base: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    known = [change for change in _FIELDS if all(key in base for key in change)]
    changes: dict[str, Any] = {}
    for change in choose.choices((*known, *choose.choices(_CHANGES, k=2)), k=choose.randint(1, 2)):
        changes |= change
    changes.pop("torch_dtype", None)  # Gemma's embeddings are scaled by what bfloat16 makes of it then
    derived = [key for key, others in _DERIVED.items() if any(other in changes for other in others)]
    return {key: value for key, value in base.items() if key not in derived}, changes


# --- GGUF ---

_PRE = ("gpt-2", "llama-bpe", "qwen2", "smollm", "deepseek-coder", "tekken", "default", "qwen35", "gpt-4o", "nobodys")
_METADATA: tuple[tuple[str, Any], ...] = (
    ("rope.freq_base", 4321.0),
    ("rope.scaling.type", "none"),
    ("rope.scaling.type", "linear"),
    ("rope.scaling.factor", 4.0),
    ("rope.scaling.type", "yarn"),
    ("rope.scaling.original_context_length", 64),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("rope.dimension_count", 20),
    ("rope.dimension_count", 10),
    ("attention.layer_norm_rms_epsilon", 1e-3),
    ("attention.logit_softcapping", 30.0),
    ("attention.clamp_kqv", 2.0),
    ("context_length", 128),
    ("expert_count", 0),
    ("logit_scale", 2.0),
)


def gguf_metadata(choose: random.Random, architecture: str) -> dict[str, Any]:
    """Changed keys of a GGUF file: of the model, and of its tokenizer."""
    changed = {f"{architecture}.{key}": value for key, value in choose.choices(_METADATA, k=choose.randint(0, 2))}
    tokenizer: dict[str, Any] = {}
    if choose.random() < 0.7:
        tokenizer["pre"] = choose.choice(_PRE)
    for key in ("add_bos_token", "add_eos_token"):
        if choose.random() < 0.5:
            tokenizer[key] = choose.random() < 0.5
    if choose.random() < 0.3:
        tokenizer["eot_token_id"] = choose.randrange(VOCAB + 20)
    return changed | {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
