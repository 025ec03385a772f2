"""transformers in bfloat16 with accelerate's disk offload: every module's weights are read when it runs."""

from __future__ import annotations

import torch
from hugging_face import generate
from measure import Timeline, arguments, emit
from transformers import AutoModelForCausalLM


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    timeline = Timeline(args.seconds)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map={"": "disk"}, offload_folder=args.scratch
    ).eval()
    emit(generate(model, args, timeline), "accelerate", "transformers", "torch")


if __name__ == "__main__":
    main()
