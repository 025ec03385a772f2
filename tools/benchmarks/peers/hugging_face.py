"""Generating and scoring with a Hugging Face model, whoever loaded it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measure import Perplexity, Timeline, windows
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Is asked after every token, so it notes each; says stop once time is up."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._timeline.token(int(input_ids[0, -1]))
        return torch.full((len(input_ids),), self._timeline.late)


def generate(model: Any, args: argparse.Namespace, timeline: Timeline) -> dict[str, Any]:
    """Continue the prompt greedily with the model's own `generate`, past any end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompt = tokenizer(args.prompt_file.read_text(encoding="utf-8"), return_tensors="pt")
    model.generation_config.eos_token_id = None
    for _ in range(1 + args.warm):
        timeline.ask()
        model.generate(
            prompt.input_ids,
            attention_mask=prompt.attention_mask,
            max_new_tokens=args.tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([Clock(timeline)]),
        )
    return timeline.report(prompt.input_ids.shape[1])


def score(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of each text, in windows that start afresh."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    result = {}
    for text in args.score:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)[: args.score_tokens]
        perplexity = Perplexity()
        for window in windows(ids, tokenizer.encode(""), args.context):
            tokens = torch.tensor([window])
            with torch.no_grad():
                scores = model(tokens).logits[0].float().log_softmax(-1)
            perplexity.add(scores[:-1].gather(1, tokens[0, 1:, None])[:, 0].double())
        result[text.name] = perplexity.report()
    return {"perplexity": result}
