"""flashrt bench: how fast a pack runs under a budget, against what the disk allows."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashrt.cli import options
from flashrt.cli.console import emit, rate, say, show, size, table
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from flashrt.engine.engine import Engine
    from flashrt.spec import ModelSpec

PREFILL = (128, 512)


def register(app: typer.Typer, name: str, guarded: Callable[..., Any]) -> None:
    app.command(name)(guarded(bench))


@options.loads(
    *("budget_gb", "experts_used", "dtype", "mode", "max_loss", *options.KV, *options.MACHINE), speculate="off"
)
def bench(
    pack: options.Model,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--prompt-tokens",
            min=1,
            metavar="N",
            show_default=False,
            help="Length of a prompt to time; may be repeated. Omitted: 128 and 512, or what the context holds.",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, metavar="N", help="Tokens to decode.")] = 32,
    repeat: Annotated[int, typer.Option("--repeat", min=1, max=100, help="Times that all is done; medians count.")] = 3,
    *,
    load: LoadOptions,
    json: options.Json = False,
) -> None:
    """Measure prefill and decode speed, bytes read per token, and the share of the disk's rate that is reached.

    The disk's rate is that of sequential O_DIRECT reads of the pack, taken between the other measurements: by one
    reader, and the best of one and of eight.

    Example: flashrt bench demo --budget-gb 1 --repeat 3 --json
    """
    from flashrt.budget.plan import Workload
    from flashrt.cli import session
    from flashrt.machine.process import peak_resident_bytes

    model = session.open_model(pack, load)
    lengths = _lengths(model.spec, prompt_tokens, new_tokens)
    workload = Workload(max(lengths) + new_tokens, prompt=max(lengths))
    with session.load(model, workload) as engine:
        largest = engine.reader.pack.largest_file
        prefill: dict[int, list[float]] = {length: [] for length in lengths}
        decodes, disk = [], []
        for i in range(repeat):
            say(f"repetition {i + 1} of {repeat}")
            for length in lengths:
                prefill[length].append(_prefill(engine, length))
            decodes.append(_decode(engine, lengths[0], new_tokens))
            disk.append(_disk_rates(largest))
        result = {
            "pack": str(engine.reader.pack.path),
            "name": engine.reader.pack.manifest.name,
            "dtype": engine.reader.pack.manifest.weights,
            "threads": engine.runtime.ops.threads(),
            "repeat": repeat,
            "prefill_tok_per_s": {str(n): n / statistics.median(times) for n, times in prefill.items()},
            "prefill_s": {str(n): statistics.median(times) for n, times in prefill.items()},
            **_decode_figures(decodes, new_tokens, disk, engine.plan.resident),
            "load_s": engine.load_s,
            "budget_bytes": engine.plan.budget_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
            "device_peak_bytes": engine.runtime.peak_bytes(),
            "plan": engine.plan.to_json(),
        }
    if json:
        emit(result)
    else:
        _print(result)


@dataclass(frozen=True, slots=True)
class _Decode:
    seconds: float
    bytes_read: int
    wait_s: float


def _lengths(spec: ModelSpec, asked: list[int] | None, new_tokens: int) -> list[int]:
    room = spec.context - new_tokens
    lengths = sorted(set(asked)) if asked else [n for n in PREFILL if n <= room] or [max(room, 0)]
    if lengths[-1] > room or lengths[0] < 1:
        raise UsageError(
            f"{lengths[-1]} prompt tokens and {new_tokens} new ones do not fit in the model's context of {spec.context}"
        )
    return lengths


def _ids(engine: Engine, length: int) -> list[int]:
    """The same arbitrary tokens every time."""
    choice = random.Random(length)
    return [choice.randrange(engine.spec.vocab) for _ in range(length)]


def _prefill(engine: Engine, length: int) -> float:
    ids = _ids(engine, length)
    engine.sequence.rewind(0)
    began = time.perf_counter()
    engine.runner.prefill(engine.sequence, ids)
    return time.perf_counter() - began


def _decode(engine: Engine, prompt: int, new_tokens: int) -> _Decode:
    engine.sequence.rewind(0)
    logits = engine.runner.prefill(engine.sequence, _ids(engine, prompt))
    read, wait = engine.reader.bytes_read, engine.wait_s
    began = time.perf_counter()
    for _ in range(new_tokens):
        logits = engine.runner.step(engine.sequence, int(logits.argmax()))
    seconds = time.perf_counter() - began
    return _Decode(seconds, engine.reader.bytes_read - read, engine.wait_s - wait)


def _disk_rates(path: Path) -> tuple[float, float]:
    """Bytes per second of one reader and of several; 0 for a pack too small to tell."""
    from flashrt.machine.disk import PLAIN_DEPTH, sequential_rate

    return sequential_rate(path), sequential_rate(path, depth=PLAIN_DEPTH)


def _decode_figures(
    decodes: list[_Decode], tokens: int, disk: list[tuple[float, float]], resident: bool
) -> dict[str, Any]:
    """Medians over the repetitions. Passes that stream nothing have no share of the disk's rate."""
    median = statistics.median
    plain = median(one for one, _ in disk)
    best = max(plain, median(several for _, several in disk))
    read_rate = median(d.bytes_read / d.seconds for d in decodes)
    streams = not resident and best > 0
    return {
        "decode_tok_per_s": median(tokens / d.seconds for d in decodes),
        "decode_tok_per_s_all": [tokens / d.seconds for d in decodes],
        "bytes_read_per_token": median(d.bytes_read / tokens for d in decodes),
        "read_bytes_per_s": read_rate,
        "disk_plain_bytes_per_s": plain or None,
        "disk_bytes_per_s": best or None,
        "disk_plain_share": read_rate / plain if streams else None,
        "disk_roofline_share": read_rate / best if streams else None,
        "io_wait_share": median(d.wait_s / d.seconds for d in decodes),
    }


def _print(result: dict[str, Any]) -> None:
    figures = table("", "figure")
    for length, speed in result["prefill_tok_per_s"].items():
        figures.add_row(f"prefill of {length} tokens", f"{speed:.1f} tokens/s")
    figures.add_row("decode", f"{result['decode_tok_per_s']:.2f} tokens/s")
    figures.add_row("read per token", size(result["bytes_read_per_token"]))
    if result["disk_roofline_share"] is not None:
        plain, best = rate(result["disk_plain_bytes_per_s"]), rate(result["disk_bytes_per_s"])
        figures.add_row("read at", rate(result["read_bytes_per_s"]))
        figures.add_row("of a plain sequential read", f"{result['disk_plain_share']:.0%} of {plain}")
        figures.add_row("of the disk's best", f"{result['disk_roofline_share']:.0%} of {best}")
    figures.add_row("time waiting for reads", f"{result['io_wait_share']:.0%}")
    peak = result["device_peak_bytes"] or result["peak_rss_bytes"]
    figures.add_row("peak memory", f"{size(peak)} of {size(result['budget_bytes'])}")
    show(figures)
