"""A layer that predicts further tokens beside a tiny model, as transformers' decoder layers compute it.

DeepSeek-V3 (arXiv:2412.19437, section 2.2): the token's embedding and the state before it, normed, side by side,
projected; a decoder layer; a norm; the model's head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests import families
from tests.families import tiny_checkpoint, tiny_gguf, tiny_model

FAMILIES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
_HYBRID = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
_HF = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post": "shared_head.norm"}
_APART = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post": "norm"}
_GGUF = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post": "shared_head_norm"}


class AheadReference(nn.Module):
    """The layer of `model`, with random weights."""

    def __init__(self, model: Any, seed: int = 1) -> None:
        super().__init__()
        config, own = model.config, model.model.layers[-1]
        types = getattr(config, "layer_types", None) or []
        index = types.index("full_attention") if "full_attention" in types else len(model.model.layers) - 1
        norm = type(model.model.norm)
        self.enorm, self.hnorm, self.post = (norm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = type(own)(config, index).float().eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in [*self.named_parameters(), *self.named_buffers()]:
                families._randomise(name, parameter, generator)
        self.__dict__["model"] = model  # no part of this one

    @torch.no_grad()
    def states(self, tokens: list[int], before: torch.Tensor) -> torch.Tensor:
        """Normed states of tokens, given the normed states before each: [T, hidden]."""
        embedded = self.model.get_input_embeddings()(torch.tensor([tokens]))
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(before[None])], -1))
        positions = torch.arange(1, len(tokens) + 1)[None]
        mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)[None, None]
        rotary = self.model.model.rotary_emb(x, positions)
        found = self.layer(x, position_embeddings=rotary, attention_mask=mask, position_ids=positions)
        return self.post(found[0] if isinstance(found, tuple) else found)[0]

    @torch.no_grad()
    def drafts(self, ids: list[int], steps: int) -> list[np.ndarray]:
        """Logits of what follows `ids`, whose last token the model has not computed, and of the likeliest after it."""
        before = self.model.model(torch.tensor([ids[:-1]])).last_hidden_state[0]
        tokens, result = ids[1:], []
        for _ in range(steps):
            states = self.states(tokens, before)
            result.append(self.model.lm_head(states[-1]).numpy())
            tokens, before = [*tokens, int(result[-1].argmax())], torch.cat([before, states[-1:]])
        return result

    def named(self, names: dict[str, str], prefix: str, layer: str) -> dict[str, torch.Tensor]:
        """Its tensors by such names, those of the decoder layer below `layer`."""
        result = {}
        for name, value in self.state_dict().items():
            head, _, rest = name.partition(".")
            result[f"{layer}.{rest}" if head == "layer" else f"{prefix}.{names[head]}.{rest}"] = value.clone()
        return result


def ahead_checkpoint(family: str, directory: Path, seed: int = 3) -> AheadReference:
    """A checkpoint of a tiny model with the layer."""
    model, _ = tiny_checkpoint(family, directory, seed)
    reference = AheadReference(model)
    place = f"model.layers.{model.config.num_hidden_layers}"
    own = reference.named(_APART, "mtp", "mtp.layers.0") if family in _HYBRID else reference.named(_HF, place, place)
    path = directory / "model.safetensors"
    save_file({**load_file(path), **own}, path, {"format": "pt"})
    return reference


def ahead_gguf(family: str, path: Path, quant: str = "F32", seed: int = 3, **overrides: Any) -> AheadReference:
    """The same as GGUF, named as llama.cpp does."""
    fields = {**families.GGUF_FIELDS.get(family, {}), **overrides}
    model = tiny_model(family, seed, **fields)
    reference, count = AheadReference(model), model.config.num_hidden_layers
    named = reference.named(_GGUF, "nextn", f"model.layers.{count}")
    holder = copy.copy(model)
    holder.__dict__["state_dict"] = lambda: {k: v for k, v in named.items() if not k.startswith("nextn")}
    own = families._gguf_tensors(holder, family)
    for name, value in named.items():
        if name.startswith("nextn"):
            added = 1.0 if family in _HYBRID and "norm" in name else 0.0
            own[f"blk.{count}.{name}"] = value.numpy() + np.float32(added)
    own = {name: value for name, value in own.items() if name.startswith(f"blk.{count}.")}
    arch = families._GGUF_ARCH.get(family, family)
    metadata = {f"{arch}.block_count": count + 1, f"{arch}.nextn_predict_layers": 1}
    tiny_gguf(family, path, seed, quant, extra=own, metadata=metadata, **fields)
    return reference
