"""Arguments and options that several commands share."""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flashrt.config import MOST_SEQUENCES, MOST_THREADS, Sampling
from flashrt.engine.options import DEFAULT_SESSION_GB, LoadOptions


class DeviceName(str, enum.Enum):
    CPU = "cpu"
    CUDA = "cuda"


class DtypeName(str, enum.Enum):
    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


class KvDtypeName(str, enum.Enum):
    F32 = "f32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


_CHECKPOINT = (
    "a Hugging Face directory, a .gguf file (the first of its parts), a directory of one, a hub repository (org/name, "
    "org/name:Q4_K_M), demo or demo-small"
)

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
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        metavar="N",
        show_default=False,
        help="Tokens of prompt and answer together that memory is planned for, up to what the model supports. "
        "Omitted: 4096, or the model's; `run` takes what its prompt and --max-new-tokens need.",
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling",
        metavar="KIND:FACTOR",
        show_default=False,
        help="Support contexts FACTOR times as long as the model was trained for: linear:4, dynamic:2 or yarn:4. "
        "Replaces the model's own scaling; the pack stays as it is.",
    ),
]
ExpertsUsed = Annotated[
    int | None,
    typer.Option(
        "--experts-used",
        min=1,
        metavar="N",
        show_default=False,
        help="Use N experts of a mixture for a token, fewer than the model was trained with: less is read, and results "
        "are no longer the model's. `flashrt eval ppl` says what that costs.",
    ),
]
Dtype = Annotated[
    DtypeName,
    typer.Option("--dtype", help="How a checkpoint is packed on first use; see `flashrt pack`. A pack has its own."),
]
PackDtype = Annotated[
    DtypeName,
    typer.Option(
        "--dtype",
        help="How weights are stored. auto keeps those of a quantized file as they are, and takes int8 for others, "
        "which is close to lossless.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=MOST_THREADS, show_default=False, help="Compute threads. Omitted: one per core."
    ),
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
        help="The rise of perplexity allowed (0.02 is 2%): --mode sparse refuses a calibration that allows more, "
        "--kv sparse keeps as few tokens as that leaves room for.",
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


Kv = Annotated[
    ModeName,
    typer.Option(
        "--kv",
        help="exact attends to every token; sparse, after `flashrt calibrate --kv`, to those that matter most.",
    ),
]
KvDtype = Annotated[
    KvDtypeName | None,
    typer.Option(
        "--kv-dtype",
        show_default=False,
        help="How keys and values are held. int8 takes 53% of bf16's memory and int4 41% (values in four bits, keys in "
        "eight), at a small loss. Omitted: bf16, or f32 for a pack of that.",
    ),
]
KvKeep = Annotated[
    str | None,
    typer.Option(
        "--kv-keep",
        metavar="SHARE",
        show_default=False,
        help="With --kv sparse: the share of the tokens that is attended to. Omitted: what --max-loss allows, or 1/16.",
    ),
]
KvDir = Annotated[
    Path | None,
    typer.Option(
        "--kv-dir",
        metavar="DIR",
        show_default=False,
        help="Where keys and values lie that do not fit in memory, until the end. Omitted: the cache directory.",
    ),
]
Session = Annotated[
    Path | None,
    typer.Option(
        "--session",
        metavar="FILE",
        show_default=False,
        help="Go on from what FILE holds of this text or chat, and save to it at the end; made where it is not there.",
    ),
]
SessionDir = Annotated[
    Path | None,
    typer.Option(
        "--session-dir",
        metavar="DIR",
        show_default=False,
        help="Keep what is computed of prompts and answers in DIR, and begin from the longest match that is there.",
    ),
]
SessionGb = Annotated[
    float | None,
    typer.Option(
        "--session-gb",
        metavar="GIB",
        show_default=False,
        help=f"What --session-dir may take; what was used least recently goes. Omitted: {DEFAULT_SESSION_GB:g}.",
    ),
]

# The fields of LoadOptions, as the command line asks for them.
LOAD: dict[str, Any] = {
    "budget_gb": BudgetGb,
    "context": Context,
    "rope_scaling": RopeScaling,
    "experts_used": ExpertsUsed,
    "dtype": Dtype,
    "mode": Mode,
    "max_loss": MaxLoss,
    "speculate": Speculate,
    "draft": Draft,
    "kv": Kv,
    "kv_dtype": KvDtype,
    "kv_keep": KvKeep,
    "kv_dir": KvDir,
    "session": Session,
    "session_dir": SessionDir,
    "session_gb": SessionGb,
    "threads": Threads,
    "device": Device,
    "host_budget_gb": HostBudgetGb,
    "cache_dir": CacheDir,
}
KV = ("kv", "kv_dtype", "kv_keep", "kv_dir")
SESSIONS = ("session", "session_dir", "session_gb")
MACHINE = ("threads", "device", "host_budget_gb", "cache_dir")


def loads(*fields: str, **fixed: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turns a function that takes `load`, a LoadOptions, into a command with an option for each of these fields.

    `fixed` are fields that the user has no say in. In the help, the options stand where `load` stands.
    """
    defaults = LoadOptions()

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            asked = {name: given.pop(name) for name in fields}
            plain = {name: value.value if isinstance(value, enum.Enum) else value for name, value in asked.items()}
            function(load=LoadOptions(**plain, **fixed), **given)

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            if parameter.name != "load":
                parameters.append(parameter)
                continue
            for name in fields:
                kind, default = inspect.Parameter.KEYWORD_ONLY, getattr(defaults, name)
                parameters.append(inspect.Parameter(name, kind, default=default, annotation=LOAD[name]))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]

Sequences = Annotated[
    int | None,
    typer.Option(
        "--sequences",
        min=1,
        max=MOST_SEQUENCES,
        metavar="N",
        show_default=False,
        help="Sequences that are computed together. `batch` takes the number that is soonest done where it is omitted.",
    ),
]

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
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        metavar="P",
        show_default=False,
        help="Make tokens of the answer so far less likely by P: -2 to 2, 0 is off.",
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        "--frequency-penalty",
        metavar="P",
        show_default=False,
        help="Make tokens of the answer so far less likely by P for each time they came: -2 to 2, 0 is off.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", show_default=False, help="0 or more: the same seed draws the same tokens."),
]


def sampling(**given: Any) -> Sampling:
    """The sampling asked for; what was not given keeps its default. Raises UsageError."""
    return Sampling(**{name: value for name, value in given.items() if value is not None})
