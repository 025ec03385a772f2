"""Tiny GGUF files in kept codecs, with random blocks, and the packs that keep them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flashrt.storage.kept import kept_of
from flashrt.storage.kept_rows import KeptEncoder
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt.storage.sources import open_checkpoint
from flashrt_kernels.rows import Codec
from tests.families import tiny_gguf
from tests.kernels.kept import kept_rows

BLOCK_BYTES = 16 << 10  # so that even tiny tensors have several blocks


@dataclass(frozen=True)
class Case:
    """A model in GGUF: the codec of each tensor, by the end of its name, perhaps with its layer; others are F32."""

    family: str
    codecs: dict[str, str]
    shape: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        def encode(name: str, values: np.ndarray) -> tuple[np.ndarray, Any] | None:
            stored = next((own for end, own in self.codecs.items() if name.endswith(end)), None)
            if stored is None:
                return None
            if stored in ("F16", "BF16"):
                kind = gguf.GGMLQuantizationType[stored]
                return gguf.quants.quantize(values, kind), kind
            codec, k = Codec(stored), values.shape[-1]
            rows = kept_rows(len(name) + values.size, values.size // k, k, codec, size=k**-0.5)
            return rows.reshape(*values.shape[:-1], -1), gguf.GGMLQuantizationType[stored.upper()]

        return tiny_gguf(self.family, path, seed=3, encode=encode, **self.shape)[1]


_K = {
    "0.attn_v.weight": "q6_k",
    "attn_q.weight": "q4_k",
    "attn_k.weight": "q4_k",
    "attn_v.weight": "q4_k",
    "attn_output.weight": "q5_k",
    "ffn_gate.weight": "q4_k",
    "0.ffn_up.weight": "iq4_xs",
    "ffn_up.weight": "q4_k",
    "1.ffn_down.weight": "q4_k",
    "ffn_down.weight": "q6_k",
    "token_embd.weight": "q4_k",
    "output.weight": "q6_k",
}
_PLAIN = {
    "1.attn_k.weight": "F16",
    "attn_q.weight": "q4_0",
    "attn_k.weight": "q4_0",
    "attn_v.weight": "q4_0",
    "attn_output.weight": "q4_1",
    "1.ffn_gate.weight": "q5_1",
    "ffn_gate.weight": "q4_0",
    "ffn_up.weight": "q5_0",
    "1.ffn_down.weight": "iq4_nl",
    "ffn_down.weight": "q8_0",
    "token_embd.weight": "q8_0",
    "output.weight": "q5_0",
}
_EXPERTS = {"gate_exps.weight": "mxfp4", "up_exps.weight": "mxfp4", "down_exps.weight": "q4_0", **_PLAIN}
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
_NARROW = {".ffn_down.weight": "F16", **_PLAIN}
_GPT_OSS = {
    **{f"{part}_exps.weight": "mxfp4" for part in ("gate", "up", "down")},
    **dict.fromkeys(("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"), "q8_0"),
    "token_embd.weight": "q8_0",
    "output.weight": "q8_0",
}
_INPUTS = {
    "per_layer_token_embd.weight": "q5_0",
    "per_layer_model_proj.weight": "BF16",
    "inp_gate.weight": "q8_0",
    ".proj.weight": "q4_0",
    **_PLAIN,
}
_LATENTS = dict.fromkeys(("a.weight", "b.weight", "a_mqa.weight", "attn_q.weight", "exps.weight"), "q8_0") | _PLAIN
_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 1088,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
}
_GEMMA4 = {"hidden_size": 96, "head_dim": 24, "num_attention_heads": 8, "global_head_dim": 32}
_FOUR_LAYERS = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
}
CASES = {
    "values that are keys": Case("gemma4", _PLAIN, {"intermediate_size": 1088, **_GEMMA4, "num_key_value_heads": 2}),
    "layer inputs": Case("gemma4-inputs", _INPUTS, {"intermediate_size": 1088, **_GEMMA4, **_FOUR_LAYERS}),
    "gpt_oss": Case("gpt_oss", _GPT_OSS, {"hidden_size": 160, "intermediate_size": 192, "swiglu_limit": 7.0, **_HEADS}),
    "k": Case("qwen2", _K, {"hidden_size": 256, "intermediate_size": 1792, **_HEADS}),
    "plain": Case("llama", _PLAIN, {"hidden_size": 160, "head_dim": 20, "intermediate_size": 1088, **_HEADS}),
    "biases": Case("llama-bias", _PLAIN, {"hidden_size": 96, "head_dim": 24, "intermediate_size": 1088, **_HEADS}),
    "experts": Case("mixtral", _EXPERTS, {"hidden_size": 96, "head_dim": 24, "intermediate_size": 384, **_HEADS}),
    "single": Case("gemma3", _NARROW, {"hidden_size": 96, "intermediate_size": 250, "head_dim": 24, **_HEADS}),
}
LATENT_CASES = {
    "latents": Case("deepseek_v3", _LATENTS, {**_SIZES, "q_lora_rank": 64}),
    "latents that lie with values": Case("deepseek_v3-lite", _LATENTS, _SIZES),
}


def keep(checkpoint: Path, out: Path, block_bytes: int = BLOCK_BYTES) -> Pack:
    """What `flashrt pack` makes of a file."""
    with open_checkpoint(checkpoint) as source:
        source.validate()
        kept = kept_of(source)
        assert kept is not None
        pack(source, out, Codec.INT8, block_bytes=block_bytes, encoder=KeptEncoder(source, kept), kept=kept)
    return Pack(out)
