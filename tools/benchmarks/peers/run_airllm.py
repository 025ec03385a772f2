"""AirLLM in bfloat16 on the CPU: one layer in memory at a time, from a copy of the checkpoint split by layers.

The copy is made in the scratch folder when it is not there yet; the harness sees to that before it measures.
"""

from __future__ import annotations

import torch
from airllm import AutoModel
from hugging_face import generate
from measure import Timeline, arguments, emit


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    timeline = Timeline(args.seconds)
    model = AutoModel.from_pretrained(
        str(args.model), device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=str(args.scratch)
    )
    emit(generate(model, args, timeline), "airllm", "transformers", "torch")


if __name__ == "__main__":
    main()
