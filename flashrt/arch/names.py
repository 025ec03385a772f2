"""Where each logical tensor of a ModelSpec lies in a checkpoint: families write templates, `Names` expands them.

In templates `{i}` is the layer and `{e}` the expert. Layer templates are relative to a prefix, because the same model
is found under several ('model.', 'language_model.model.' in multimodal checkpoints, none in bare ones).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from flashrt.arch.harmless import GGUF_HARMLESS, HF_HARMLESS
from flashrt.spec import Attention, DeltaNet, LatentAttention, ModelSpec

Has = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive rows of a logical tensor: all rows, or `rows` of them, of one checkpoint tensor.

    expert: the slice of a stacked tensor [experts, rows, columns]
    groups: `rows` are those of each of so many groups, of so many rows each
    heads: the rows are stored permuted for interleaved rotary embedding, this many heads; reading undoes it
    rotary: the rows of each head that are permuted, behind `fixed` others
    step: the rows are every step-th, from rows[0] on
    transposed: the tensor is [experts, columns, rows]; of rows of `groups`, each group's are columns
    add: added to every value (Gemma's norms are stored as w, and multiply by 1 + w)
    columns: a vector is stored as rows of so many numbers, and read column by column
    log: stored as the logarithm of its negative
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    heads: int = 0
    rotary: int = 0
    fixed: int = 0
    add: float = 0.0
    groups: tuple[int, int] | None = None
    columns: int = 0
    log: bool = False
    step: int = 1
    transposed: bool = False
    stacked: int = 0  # the rows are those of so many matrices, one after the other


class Share(NamedTuple):
    """Rows of each of so many groups of so many rows."""

    groups: tuple[int, int]
    rows: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FfnNames:
    """Templates of one way to store a feed-forward block; `gate` is None when it is not gated.

    stacked: the tensors are [experts, rows, columns]; fused: `gate` and `up` name one tensor, gate rows first.
    interleaved: rows of gate and up follow each other there; transposed: the tensors are [experts, columns, rows].
    """

    gate: str | None
    up: str
    down: str
    stacked: bool = False
    fused: bool = False
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """Templates for one family in one kind of checkpoint.

    permuted: query and key rows are stored for interleaved rotary embedding
    latent: those of latent attention, "kv_b" for k_b and v_b in one tensor
    recurrent: templates that take the place of those of `layer` in recurrent layers
    shares: of these, the rows of each part that is not all of its tensor
    log_rate: the rates at which states decay are stored as logarithms
    interleaved_biases: those of gate and up are one tensor, in which they follow each other
    ahead: templates of what a layer behind the last has besides, which predicts further tokens (`arch.ahead`)
    apart: names of such a layer that is stored apart from the others, in place of `ahead`
    """

    prefixes: tuple[str, ...]
    shared: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    dense: tuple[FfnNames, ...]
    experts: tuple[FfnNames, ...] = ()
    shared_expert: tuple[FfnNames, ...] = ()
    head: tuple[str, ...] = ("lm_head.weight",)  # absolute
    norm_add: float = 0.0
    permuted: bool = False
    layer_prefix: str = "layers.{i}."
    ahead: Mapping[str, str] = field(default_factory=dict)
    apart: Names | None = None
    interleaved_biases: bool = False
    harmless: tuple[str, ...] = HF_HARMLESS
    recurrent: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    latent: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, Callable[[DeltaNet], Sequence[Share]]] = field(default_factory=dict)
    log_rate: bool = False

    def resolve(self, spec: ModelSpec, has: Has) -> TensorMap:
        """The names as one checkpoint spells them; `has` tells whether it holds a tensor of that name."""
        known = [self.shared[key] for key in ("embed", "norm.final") if key in self.shared]
        prefix = next((p for p in self.prefixes if any(has(p + name) for name in known)), self.prefixes[0])
        head = next((name for name in self.head if has(name)), self.head[0])
        return TensorMap(self, spec, prefix, head, has)


@dataclass(frozen=True)
class TensorMap:
    """Logical name → parts, for one checkpoint."""

    names: Names
    spec: ModelSpec
    prefix: str
    head: str
    has: Has = field(repr=False)

    def parts(self, key: str) -> tuple[Part, ...]:
        """The parts of a vector or matrix, stacked along rows."""
        if key == "head":
            return (Part(self.head),)
        if key in self.names.shared:
            name = self.prefix + self.names.shared[key]
            if key == "embed" and self.spec.tied and not self.has(name) and self.has(self.head):
                name = self.head  # tied weights may be stored under either name
            return (self._adjust(key, Part(name)),)
        layer, _, name = key.partition(".")
        mixer = self.spec.layers[int(layer)].mixer
        if isinstance(mixer, DeltaNet) and name in self.names.recurrent:
            return self._recurrent(int(layer), name, mixer)
        if isinstance(mixer, LatentAttention) and name in (*self.names.latent, "k_b", "v_b"):
            return (self._latent(int(layer), name, mixer),)
        templates = self.names.layer[name]
        if isinstance(mixer, Attention) and name in ("qkv", "qkv.bias") and len(templates) > 1:  # some layers lack some
            templates = tuple(own for own, rows in zip(templates, mixer.qkv_parts, strict=True) if rows)
        parts = [Part(self._layer(int(layer), template)) for template in templates]
        if isinstance(mixer, Attention) and mixer.output_gate and name in ("qkv", "gate"):  # beside the queries
            first, groups = (0 if name == "qkv" else mixer.head_dim), (mixer.heads, 2 * mixer.head_dim)
            parts[0] = replace(parts[0], groups=groups, rows=(first, first + mixer.head_dim))
        if name in ("gate.bias", "up.bias") and self.names.interleaved_biases:
            length = 2 * self.spec.layers[int(layer)].ffn.neurons
            parts = [replace(part, rows=(int(name == "up.bias"), length), step=2) for part in parts]
        if name in ("qkv", "qkv.bias") and self.names.permuted:
            attention = self.spec.layers[int(layer)].attention
            rope, dim = attention.rope, attention.head_dim
            rotary = dim if rope is None else rope.width(dim)
            parts[0] = replace(parts[0], heads=attention.heads, rotary=rotary)
            parts[1] = replace(parts[1], heads=attention.kv_heads, rotary=rotary)
        return tuple(self._adjust(name, part) for part in parts)

    def _recurrent(self, layer: int, name: str, net: DeltaNet) -> tuple[Part, ...]:
        parts = [Part(self._layer(layer, template)) for template in self.names.recurrent[name]]
        if name in self.names.shares:
            shares = self.names.shares[name](net)
            parts = [replace(part, groups=s.groups, rows=s.rows) for part, s in zip(parts, shares, strict=True)]
        if name == "taps":
            parts = [replace(part, columns=net.taps) for part in parts]
        if name == "decay.rate":
            parts = [replace(part, log=self.names.log_rate) for part in parts]
        return tuple(parts)

    def _latent(self, layer: int, name: str, own: LatentAttention) -> Part:
        """k_b and v_b may be rows of one tensor, head by head: those of k_b are its columns then."""
        part = Part(self._layer(layer, self.names.latent.get(name, "")))
        rotary = own.head_dim - own.rank
        if name in ("k_b", "v_b"):
            if name in self.names.latent and self.has(part.tensor):
                return replace(part, stacked=own.heads)
            joint, end = self._layer(layer, self.names.latent["kv_b"]), own.nope_dim + own.value_dim
            rows = (0, own.nope_dim) if name == "k_b" else (own.nope_dim, end)
            return Part(joint, groups=(own.heads, end), rows=rows, transposed=name == "k_b")
        if self.names.permuted and name in ("q_b", "queries"):
            return replace(part, heads=own.heads, rotary=rotary, fixed=own.nope_dim)
        if self.names.permuted and name == "kv_a":
            return replace(part, heads=1, rotary=rotary, fixed=own.rank)
        return part

    def neurons(self, key: str, run: int) -> tuple[Part | None, Part, Part]:
        """(gate, up, down) of one run of a layer's neurons."""
        prefix, _, block = key.partition(".")
        layer = int(prefix)
        mixture = block == "ffn" and self.spec.layers[layer].ffn.experts > 0
        ways = self.names.shared_expert if block == "shared" else self.names.experts if mixture else self.names.dense
        index = run if mixture else None
        stored = (w for w in ways if all(self.has(self._layer(layer, name, index)) for name in (w.up, w.down)))
        way = next(stored, ways[0])
        part = index if way.stacked else None
        down = Part(self._layer(layer, way.down, index), part, transposed=way.transposed)
        if way.fused:
            neurons = self.spec.layer_neurons(layer)[key][1]
            fused = Part(self._layer(layer, way.up, index), part, transposed=way.transposed)
            if way.interleaved:
                gate, up = (replace(fused, rows=(first, 2 * neurons), step=2) for first in (0, 1))
                return gate, up, down
            return replace(fused, rows=(0, neurons)), replace(fused, rows=(neurons, 2 * neurons)), down
        own = None if way.gate is None else Part(self._layer(layer, way.gate, index), part)
        return own, Part(self._layer(layer, way.up, index), part), down

    def is_harmless(self, tensor: str) -> bool:
        """Whether no logit depends on a tensor that no part names."""
        known = any(re.fullmatch(pattern, tensor) for pattern in self.names.harmless)
        return known or self._is_beyond(tensor) or tensor in self._unused

    @functools.cached_property
    def _unused(self) -> frozenset[str]:
        """What checkpoints may hold of layers that attend to the keys and values of another."""
        layer = self.names.layer
        unused = [name for key in ("qkv", "qkv.bias") if len(layer[key]) > 1 for name in layer[key][1:]]
        borrowing = [i for i, attention in self.spec.attentions.items() if attention.kv_from is not None]
        return frozenset(self._layer(i, name) for i in borrowing for name in (*unused, *layer["k_norm"]))

    def _is_beyond(self, tensor: str) -> bool:
        """Whether a tensor belongs to a layer behind the last that only predicts further tokens."""
        if not self.names.ahead:
            return False
        before, after = map(re.escape, (self.prefix + self.names.layer_prefix).split("{i}"))
        found = re.match(f"{before}(\\d+){after}", tensor)
        layer = -1 if found is None else int(found[1])
        return layer >= len(self.spec.layers) and self.has(self._layer(layer, self.names.ahead["join"]))

    def _layer(self, layer: int, template: str, expert: int | None = None) -> str:
        return self.prefix + (self.names.layer_prefix + template).format(i=layer, e=expert)

    def _adjust(self, name: str, part: Part) -> Part:
        is_norm = "norm" in name and not name.endswith(".bias")
        return replace(part, add=self.names.norm_add) if is_norm and self.names.norm_add else part


HF_LAYER: dict[str, tuple[str, ...]] = {
    "norm.attention": ("input_layernorm.weight",),
    "norm.ffn": ("post_attention_layernorm.weight",),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "qkv": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "qkv.bias": tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
    "out": ("self_attn.o_proj.weight",),
    "out.bias": ("self_attn.o_proj.bias",),
    "router": ("mlp.gate.weight",),
    "gate": ("self_attn.q_proj.weight",),
    **{f"{part}.bias": (f"mlp.{part}_proj.bias",) for part in ("gate", "up", "down")},
}
HF_SHARED = {"embed": "embed_tokens.weight", "norm.final": "norm.weight"}
HF_AHEAD = {
    "join": "eh_proj.weight",
    "norm.token": "enorm.weight",
    "norm.state": "hnorm.weight",
    "norm.final": "shared_head.norm.weight",
}
GGUF_AHEAD = {
    "join": "nextn.eh_proj.weight",
    "norm.token": "nextn.enorm.weight",
    "norm.state": "nextn.hnorm.weight",
    "norm.final": "nextn.shared_head_norm.weight",
}


def gated_names(prefix: str) -> FfnNames:
    """Three projections as most families call them."""
    return FfnNames(prefix + "gate_proj.weight", prefix + "up_proj.weight", prefix + "down_proj.weight")


HF_DENSE = gated_names("mlp.")

HF_FUSED = FfnNames("mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight", fused=True)

HF_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "model.text_model.", "")
HF_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
HF_DECODER = Names(HF_PREFIXES, HF_SHARED, HF_LAYER, (HF_DENSE,), head=HF_HEADS)
"""The naming that Llama started and most families follow; models that see have it below a name of their own."""

GGUF_NAMES = Names(
    prefixes=("",),
    shared={
        "embed": "token_embd.weight",
        "norm.final": "output_norm.weight",
    },
    layer={
        "norm.attention": ("attn_norm.weight",),
        "norm.attention_post": ("post_attention_norm.weight",),
        "norm.ffn": ("ffn_norm.weight",),
        "norm.ffn_post": ("post_ffw_norm.weight",),
        "q_norm": ("attn_q_norm.weight",),
        "k_norm": ("attn_k_norm.weight",),
        "qkv": tuple(f"attn_{name}.weight" for name in "qkv"),
        "qkv.bias": tuple(f"attn_{name}.bias" for name in "qkv"),
        "gate": ("attn_q.weight",),
        "out": ("attn_output.weight",),
        "out.bias": ("attn_output.bias",),
        "router": ("ffn_gate_inp.weight",),
        "router.bias": ("ffn_gate_inp.bias",),
        "router.correction": ("exp_probs_b.bias",),
        "shared_gate": ("ffn_gate_inp_shexp.weight",),
        **{f"{part}.bias": (f"ffn_{part}.bias",) for part in ("gate", "up", "down")},
    },
    dense=(FfnNames("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),),
    experts=(
        FfnNames("ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", stacked=True),
        FfnNames("ffn_gate_up_exps.weight", "ffn_gate_up_exps.weight", "ffn_down_exps.weight", True, True),
        FfnNames("ffn_gate.{e}.weight", "ffn_up.{e}.weight", "ffn_down.{e}.weight"),
    ),
    shared_expert=(FfnNames("ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"),),
    head=("output.weight",),
    layer_prefix="blk.{i}.",
    harmless=GGUF_HARMLESS,
)
"""llama.cpp's naming, which most families share."""
GGUF_PERMUTED = replace(GGUF_NAMES, permuted=True)
GGUF_FUSED = FfnNames("ffn_up.weight", "ffn_up.weight", "ffn_down.weight", fused=True)
