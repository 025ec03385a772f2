"""Arguments and options that several commands share."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from flashrt.config import Sampling
from flashrt_kernels.rows import Codec


class DeviceName(str, enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


_CHECKPOINT = "a Hugging Face directory, a .gguf file, a hub repository (org/name), demo or demo-small"

Model = Annotated[
    str,
    typer.Argument(
        metavar="PACK",
        show_default=False,
        help=f"A pack, or a checkpoint that is packed once into the cache: {_CHECKPOINT}.",
    ),
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", show_default=False, help=_CHECKPOINT[0].upper() + _CHECKPOINT[1:] + ".")
]
BudgetGb = Annotated[
    float | None,
    typer.Option(
        "--budget-gb",
        metavar="GIB",
        show_default=False,
        help="Memory, in GiB, that the whole process may hold (with --device cuda: all its GPU memory). Above 0. "
        "Omitted: what the model needs, or what the machine has free.",
    ),
]
HostBudgetGb = Annotated[
    float | None,
    typer.Option(
        "--host-budget-gb",
        metavar="GIB",
        show_default=False,
        help="With --device cuda: host memory, in GiB, that the process may hold. Omitted: half of what is free.",
    ),
]
Dtype = Annotated[
    Codec,
    typer.Option("--dtype", help="How a checkpoint is packed on first use; a pack has its own."),
]
PackDtype = Annotated[Codec, typer.Option("--dtype", help="How weights are stored; int8 is close to lossless.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, show_default=False, help="Compute threads. Omitted: one per core."),
]
Device = Annotated[DeviceName, typer.Option("--device", help="Where to compute.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="DIR",
        show_default=False,
        help="Where checkpoints, packs made of them and disk measurements are kept. Omitted: "
        "$XDG_CACHE_HOME/flashrt, or ~/.cache/flashrt.",
    ),
]


class ModeName(str, enum.Enum):
    EXACT = "exact"
    SPARSE = "sparse"


Mode = Annotated[
    ModeName,
    typer.Option("--mode", help="exact computes what the weights say; sparse, after `flashrt calibrate`, leaves out."),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        "--max-loss",
        metavar="SHARE",
        show_default=False,
        help="With --mode sparse: refuse a calibration that lets perplexity rise by more (0.02 is 2%).",
    ),
]
Speculate = Annotated[
    str,
    typer.Option(
        "--speculate",
        metavar="off|auto|N",
        help="Draft tokens, and verify up to N of them (2 to 16) in one pass. The text is the same.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="PACK",
        show_default=False,
        help="The pack of a smaller model with the same tokens, which drafts from memory, within the same budget.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]

Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", show_default=False, help="0 to 100; 0 takes the most likely token."),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", metavar="N", show_default=False, help="Draw from the N most likely tokens; 0: from all."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        metavar="P",
        show_default=False,
        help="Draw from the smallest set of tokens whose probability reaches P, above 0 to 1.",
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        "--min-p",
        metavar="P",
        show_default=False,
        help="Drop tokens less likely than P times the most likely one, 0 to 1.",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        metavar="R",
        show_default=False,
        help="Make tokens seen before less likely: 0.01 to 100, 1 is off.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", show_default=False, help="0 or more: the same seed draws the same tokens."),
]


def sampling(**given: Any) -> Sampling:
    """The sampling asked for; what was not given keeps its default. Raises UsageError."""
    return Sampling(**{name: value for name, value in given.items() if value is not None})
