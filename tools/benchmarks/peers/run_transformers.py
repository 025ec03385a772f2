"""transformers in bfloat16, all weights in memory."""

from __future__ import annotations

import torch
from hugging_face import generate, score
from measure import Timeline, arguments, emit
from transformers import AutoModelForCausalLM


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    timeline = Timeline(args.seconds)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    emit(score(model, args) if args.score else generate(model, args, timeline), "transformers", "torch")


if __name__ == "__main__":
    main()
