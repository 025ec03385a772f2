"""The buffers that a pass computes in: their shapes, so that planner and decoder agree to the byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashrt.kv.recurrent import KEPT_ROWS
from flashrt.rope import Rope
from flashrt.spec import LatentAttention, ModelSpec
from flashrt.storage.layout import PackLayout
from flashrt_kernels.rows import row_bytes

INPUT_ROWS = 16  # tokens whose layer inputs are read at a time: their rows are long
UP_ROWS = 512  # of up that are multiplied at a time where neurons are matrices in a file
SCORE_ROWS = 1024  # rows of the head that are scored at a time when every token's probability is wanted


@dataclass(frozen=True, slots=True)
class BufferShape:
    shape: tuple[int, ...]
    item_bytes: int = 4  # float32; 1 is uint8

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.item_bytes


def ropes(spec: ModelSpec) -> list[tuple[Rope, int]]:
    """The distinct (rope, head_dim) pairs of a model, in order of appearance."""
    pairs = ((attention.rope, attention.head_dim) for attention in spec.attentions.values())
    return list(dict.fromkeys((rope, dim) for rope, dim in pairs if rope is not None))


def working_set(
    spec: ModelSpec, layout: PackLayout, tokens: int, logit_rows: int, scoring: bool
) -> dict[str, BufferShape]:
    """Buffers of a pass of at most `tokens` tokens that asks for the logits of at most `logit_rows` of them.

    With `scoring`, strips of the head's output for all tokens are added.
    """
    mixers = {layer.mixer for layer in spec.layers}
    nets = set(spec.delta_nets.values())
    gates = [mixer.width for mixer in mixers if "gate" in mixer.matrices(spec.hidden)]
    experts = max(layer.ffn.experts for layer in spec.layers)
    shapes = {
        "x": BufferShape((tokens, spec.hidden)),
        "normed": BufferShape((tokens, spec.hidden)),
        "y": BufferShape((tokens, spec.hidden)),
        "qkv": BufferShape((tokens, max(mixer.row_width for mixer in mixers))),
        "attended": BufferShape((tokens, max(mixer.width for mixer in mixers))),
    }
    if spec.follows:  # whose embeddings and head are another model's
        shapes["pair"] = BufferShape((tokens, 2 * spec.hidden))
    else:
        encoded = max(tokens * _row_bytes(layout, "embed"), _input_row_bytes(spec, layout))
        shapes |= {"encoded": BufferShape((encoded,), 1), "logits": BufferShape((logit_rows, spec.vocab))}
    for i, (rope, head_dim) in enumerate(ropes(spec)):
        shapes[f"cos{i}"] = shapes[f"sin{i}"] = BufferShape((tokens, rope.width(head_dim) // 2))
    if gates:
        shapes["gate"] = BufferShape((tokens, max(gates)))
    if nets:
        shapes["rows"] = BufferShape((KEPT_ROWS, max(net.row_width for net in nets)))
    if latents := [mixer for mixer in mixers if isinstance(mixer, LatentAttention)]:
        shapes["absorbed"] = BufferShape((tokens, max(own.heads * own.head_dim for own in latents)))
        shapes["latents"] = BufferShape((tokens, max(own.heads * own.rank for own in latents)))
    if experts:
        shapes["router"] = BufferShape((tokens, experts))
        shapes["ahead"] = BufferShape((tokens, spec.hidden))
    if ups := [t for t in layout.tensors.values() if t.name.endswith(":up")]:
        shapes["hidden"] = BufferShape((tokens, max(t.rows for t in ups)))
        shapes["up"] = BufferShape((tokens, UP_ROWS))
        shapes["routed"] = BufferShape((tokens, spec.hidden))
    if any(layer.ffn.branch_norms for layer in spec.layers):
        shapes["branch"] = BufferShape((tokens, spec.hidden))
    if spec.layer_inputs:
        width = len(spec.layers) * spec.layer_inputs
        shapes["inputs"] = BufferShape((tokens, width))
        shapes["input_rows"] = BufferShape((min(tokens, INPUT_ROWS), width))
        shapes["input_gate"] = BufferShape((tokens, spec.layer_inputs))
    if columns := layout.channel_columns:
        shapes["sums"] = BufferShape((tokens, columns))
    if scoring:
        shapes["strip"] = BufferShape((tokens, SCORE_ROWS))
    return shapes


def _row_bytes(layout: PackLayout, name: str) -> int:
    """Of an encoded row of a matrix."""
    tensor = layout.tensors[name]
    return row_bytes(tensor.codec, tensor.columns)


def _input_row_bytes(spec: ModelSpec, layout: PackLayout) -> int:
    """Of the layer inputs that are read at a time."""
    return INPUT_ROWS * _row_bytes(layout, "inputs.embed") if spec.layer_inputs else 0
