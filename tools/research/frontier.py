#!/usr/bin/env python3
"""Bytes against loss for the ways to leave out parts of a gated feed-forward block, on a real checkpoint.

    python -m tools.research.frontier CHECKPOINT TEXT... --tokens 512 --out frontier.json [--plot frontier.png]

Every method is a rule for what of each block a token touches, the same share in every layer (no allocation, no
calibration: the bare methods), simulated with transformers in bfloat16 on weights rounded to 4 bits in groups of 32:

    oracle      rows of the bundle by |h| * norm of the down row, computed exactly and for nothing: the upper bound
    low-rank    the same by gate and up of low rank, the best for other text's inputs (rank 256 at 8 bits)
    two-bit     the same by the upper two bits of the codes of gate and up, which are read for every row
    channels    columns of gate and up by |x| * norm of the column; then rows of down by |h| * norm, exactly
    three-step  channels, those in the middle with the upper two bits of their codes only

Bytes are those touched per token over the block's, what decides included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, grouped, table

GROUP = 32
COARSE = 2.5 / 4.5  # bytes of the upper two bits of codes and the scales, over those of whole rows
RANK = 256
FIT_TOKENS = 1024
POINTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "oracle": ((0.5,), (0.4,), (0.3,), (0.2,)),
    "low-rank": ((0.6,), (0.5,), (0.4,)),
    "two-bit": ((0.5,), (0.4,), (0.3,), (0.2,)),
    "channels": ((0.8, 0.6), (0.7, 0.5), (0.65, 0.45), (0.55, 0.4)),
    "three-step": ((0.95, 0.55, 0.6), (0.9, 0.45, 0.5), (0.85, 0.35, 0.45), (0.75, 0.25, 0.4)),
}


@dataclass(slots=True)
class Block:
    """Weights of one block as a pack would hold them: whole, and with the upper two bits only (bfloat16 tensors)."""

    gate: Any
    up: Any
    coarse_gate: Any
    coarse_up: Any
    down: Any  # [neurons, hidden]
    column_norms: Any
    row_norms: Any
    factors: tuple[Any, Any, Any] | None = None  # low rank: [hidden, rank], and [rank, neurons] twice


def rounded(weights: Any) -> tuple[Any, Any]:
    """float [n, k] → the nearest 4-bit weights, and the middle of what the upper two bits leave open."""
    groups = weights.float().reshape(len(weights), -1, GROUP)
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low).clamp_min(1e-9) / 15
    codes = ((groups - low) / step).round().clamp(0, 15)
    coarse = 4 * (codes // 4) + 1.5
    return tuple((low + step * c).reshape(weights.shape).bfloat16() for c in (codes, coarse))  # type: ignore[return-value]


def take(mlp: Any) -> Block:
    gate, coarse_gate = rounded(mlp.gate_proj.weight.data)
    up, coarse_up = rounded(mlp.up_proj.weight.data)
    down, _ = rounded(mlp.down_proj.weight.data.T.contiguous())
    columns = (gate.float() ** 2).sum(0) + (up.float() ** 2).sum(0)
    return Block(gate, up, coarse_gate, coarse_up, down, columns.sqrt(), (down.float() ** 2).sum(1).sqrt())


def fit_low_rank(block: Block, inputs: Any, rank: int) -> None:
    """Factors of gate and up whose products with `inputs` (float [n, hidden]) are the nearest of their rank."""
    import torch

    values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
    root = vectors * values.clamp_min(values.max() * 1e-6).sqrt()
    both = torch.cat((block.gate, block.up)).float()
    _, _, right = torch.linalg.svd((both @ root).T @ (both @ root))
    basis = right[:rank].T  # of the inputs in whitened coordinates
    inverse = vectors / values.clamp_min(values.max() * 1e-6).sqrt()
    encode, decode = inverse @ basis, root @ basis
    block.factors = encode, (block.gate.float() @ decode).T, (block.up.float() @ decode).T


def kept(counts: Any, share: float) -> Any:
    """Whether each of [tokens, n] counts is among the largest `share` of all tokens' and channels'."""
    if share >= 1:
        return counts >= 0
    flat = counts.flatten()
    flat = flat[:: max(len(flat) // 400_000, 1)]
    return counts > flat.kthvalue(max(int(len(flat) * (1 - share)), 1)).values


def _hidden(act: Callable[[Any], Any], gate: Any, up: Any) -> Any:
    return act(gate.float()) * up.float()


def output(block: Block, act: Callable[[Any], Any], method: str, point: tuple[float, ...], x: Any) -> Any:
    """The block's output, float [tokens, hidden], for inputs bfloat16 [tokens, hidden]."""
    if method in ("channels", "three-step"):
        counts = x.float().abs() * block.column_norms
        some = kept(counts, point[0])
        whole = kept(counts, point[1]) if method == "three-step" else some
        top, middle = x * whole, x * (some & ~whole)
        gate = top @ block.gate.T + middle @ block.coarse_gate.T
        up = top @ block.up.T + middle @ block.coarse_up.T
        h, share = _hidden(act, gate, up), point[-1]
        chosen = kept(h.abs() * block.row_norms, share)
    else:
        h = _hidden(act, x @ block.gate.T, x @ block.up.T)
        guess = h
        if method == "two-bit":
            guess = _hidden(act, x @ block.coarse_gate.T, x @ block.coarse_up.T)
        elif method == "low-rank":
            assert block.factors is not None
            encode, gate, up = block.factors
            inner = x.float() @ encode
            guess = _hidden(act, inner @ gate, inner @ up)
        chosen = kept(guess.abs() * block.row_norms, point[0])
    return (h * chosen).bfloat16() @ block.down


def nbytes(method: str, point: tuple[float, ...], block: Block) -> float:
    """What a token touches, as a share of the block in 4 bits."""
    if method == "channels":
        return 2 / 3 * point[0] + point[1] / 3
    if method == "three-step":
        return 2 / 3 * (point[1] + COARSE * (point[0] - point[1])) + point[2] / 3
    if method == "two-bit":
        # What was read to decide is not read again: rows that take part bring the lower bits and the row of down.
        return 2 / 3 * COARSE + point[0] * (2 / 3 * (1 - COARSE) + 1 / 3)
    if method == "low-rank":
        neurons, hidden = block.gate.shape
        return RANK * (hidden + 2 * neurons) * 8 / (3 * neurons * hidden * 4.5) + point[0]
    return point[0]


class Simulation:
    """A checkpoint whose blocks compute by one method at a time."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        import transformers

        self.torch = torch
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        self.method: tuple[str, tuple[float, ...]] = ("oracle", (1.0,))
        self.seen: list[list[Any]] | None = None
        self.blocks = []
        for i, layer in enumerate(self.model.model.layers):
            self.blocks.append(take(layer.mlp))
            layer.mlp.forward = self._forward(i, layer.mlp.act_fn)

    def _forward(self, i: int, act: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def forward(x: Any) -> Any:
            if self.seen is not None:
                self.seen[i].append(x[0].float())
            return output(self.blocks[i], act, *self.method, x[0])[None]

        return forward

    def fit(self, ids: list[int]) -> None:
        """Fit what has to be fitted to the inputs that a text gives."""
        self.seen = [[] for _ in self.blocks]
        self.loss(ids)
        for block, inputs in zip(self.blocks, self.seen, strict=True):
            fit_low_rank(block, self.torch.cat(inputs), RANK)
        self.seen = None

    def loss(self, ids: list[int]) -> float:
        """Mean negative log-probability, nats."""
        with self.torch.no_grad():
            tokens = self.torch.tensor([ids])
            logits = self.model(tokens).logits[0].float()
            return float(self.torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:]))


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.research.frontier", __doc__)
    parser = benchmark.parser
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--methods", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--plot", type=Path, help="needs matplotlib")
    args = benchmark.parse(arguments)
    simulation = Simulation(args.checkpoint)
    texts = [simulation.tokenizer(path.read_text()).input_ids for path in args.texts]
    starts = [ids[: args.tokens] for ids in texts]
    if "low-rank" in args.methods:
        simulation.fit(texts[-1][args.tokens : args.tokens + FIT_TOKENS])
    dense = [simulation.loss(ids) for ids in starts]
    samples = [sample for method in args.methods for sample in points(simulation, method, starts, dense)]
    if args.plot:
        draw(samples, args.plot)
    names = [path.name for path in args.texts]
    parameters = {
        "model": args.checkpoint.name,
        "texts": names,
        "tokens": [len(ids) for ids in starts],
        "perplexity": [math.exp(loss) for loss in dense],
    }
    benchmark.publish(parameters, samples, summary(parameters, samples))


def points(simulation: Simulation, method: str, texts: list[list[int]], dense: list[float]) -> Iterator[Sample]:
    """Every point of a method, and what it costs on each text."""
    for point in POINTS[method]:
        simulation.method = method, point
        began = time.perf_counter()
        losses = [math.expm1(simulation.loss(ids) - exact) for ids, exact in zip(texts, dense, strict=True)]
        share = nbytes(method, point, simulation.blocks[0])
        figures = ", ".join(f"{loss:+.2%}" for loss in losses)
        say(f"{method:10} {point} {share:.0%} of the bytes: {figures} ({time.perf_counter() - began:.0f} s)")
        yield {"method": method, "point": point, "bytes": share, "losses": losses}


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    text = (
        "What a token touches of the feed-forward blocks against what it costs, by method, the same share in every "
        f"layer: {parameters['model']}, simulated. The methods are described in `tools/research/frontier.py`."
    )
    columns = ["method", "kept", ("bytes", "share"), *((f"{t}, perplexity", "change") for t in parameters["texts"])]
    rows = [[s["method"], ", ".join(f"{share:.0%}" for share in s["point"]), s["bytes"], *s["losses"]] for s in samples]
    return {"text": [text], "tables": [table(columns, rows)]}


def curves(samples: list[Sample]) -> dict[str, list[tuple[float, float]]]:
    """Method → share of the bytes and mean rise of perplexity, by share."""
    return {
        method: sorted((s["bytes"], sum(s["losses"]) / len(s["losses"])) for s in group)
        for (method,), group in grouped(samples, "method").items()
    }


def draw(samples: list[Sample], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, points in curves(samples).items():
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xlabel="share of the feed-forward bytes touched", ylabel="rise of perplexity, mean of the texts")
    axes.set_ylim(0, 0.3)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
