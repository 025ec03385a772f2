"""A model of transformers that an engine computes: `generate`, pipelines and lm-eval's `hf` run on a pack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from flashrt.engine.engine import Engine


class FlashrtConfig(PreTrainedConfig):
    """What transformers asks of a model: the size of its vocabulary, its context, its special tokens."""

    model_type = "flashrt"

    @classmethod
    def of(cls, engine: Engine) -> FlashrtConfig:
        sizes: dict[str, Any] = {"max_position_embeddings": engine.plan.context, "use_cache": False}
        found = cls(**sizes)
        found.vocab_size = engine.spec.vocab
        found.bos_token_id = engine.tokenizer.bos
        found.eos_token_id = sorted(engine.spec.eos)
        return found


class FlashrtForCausalLM(PreTrainedModel, GenerationMixin):
    """The model of an engine, on the CPU as far as transformers is concerned.

    `generate` is transformers' own: processors, criteria, beams and streamers do what they do there. What a text shares
    with the one before it is not computed again, so a pass computes one token; rows of a batch are computed one after
    the other, each from where it differs from the row before it. Drafts are not used: `Engine.generate` uses them.

    The budget bounds what the engine holds and what the process held when it was loaded: load it after transformers.
    Logits of whole texts, float32 [rows, tokens, vocab], are the caller's, as with any model.
    """

    config_class = FlashrtConfig
    main_input_name = "input_ids"
    _is_stateful = True  # keys and values lie in the engine: there is no cache to crop or to copy

    def __init__(self, engine: Engine) -> None:
        super().__init__(FlashrtConfig.of(engine))
        self.engine = engine
        recommended = {name: value for name, value in engine.tokenizer.text.generation.items() if value is not None}
        ends = {"bos_token_id": self.config.bos_token_id, "eos_token_id": self.config.eos_token_id}
        self.generation_config = GenerationConfig.from_dict(recommended | ends | {"use_cache": False})
        self.eval()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All tokens: the engine knows which of them it has computed."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits after the tokens of each row, float32 [B, T, vocab], or after the last `logits_to_keep` alone.

        attention_mask: 0 for padding, on either side; what stands there has logits of 0

        Raises ValueError for a mask with holes, for labels and embeddings, and for a row without tokens; UsageError as
        `Engine.logits` does.
        """
        given = [name for name in ("labels", "inputs_embeds", "position_ids") if kwargs.get(name) is not None]
        if given:
            raise ValueError(f"flashrt takes input_ids and attention_mask, not {given[0]}")
        count = input_ids.shape[1] if logits_to_keep == 0 else min(logits_to_keep, input_ids.shape[1])
        logits = torch.zeros(len(input_ids), count, self.config.vocab_size)
        for row, ids in enumerate(input_ids):
            begin, end = _extent(None if attention_mask is None else attention_mask[row], len(ids))
            self._fill(logits[row], ids[begin:end].tolist(), begin - (len(ids) - count))
        return CausalLMOutput(logits=logits)

    def _fill(self, out: Tensor, ids: list[int], at: int) -> None:
        """Logits after each of `ids`, the first of which belong at row `at` of `out`; where that is below 0 they go."""
        if at + len(ids) == len(out) == 1:
            out[0] = torch.from_numpy(self.engine.prefill(ids))
            return
        for piece in self.engine.logits(ids):
            rows = torch.from_numpy(piece)[max(-at, 0) :]
            first = max(at, 0)
            out[first : first + len(rows)] = rows
            at += len(piece)


def _extent(mask: Tensor | None, length: int) -> tuple[int, int]:
    """Where the tokens of a row are that are no padding."""
    if mask is None:
        return 0, length
    kept = mask.nonzero().flatten()
    if len(kept) == 0 or int(kept[-1] - kept[0]) + 1 != len(kept):
        raise ValueError("a row of an attention mask has one run of ones here: padding is on the left or the right")
    return int(kept[0]), int(kept[-1]) + 1


AutoConfig.register(FlashrtConfig.model_type, FlashrtConfig)
AutoModelForCausalLM.register(FlashrtConfig, FlashrtForCausalLM)
