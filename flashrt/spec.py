"""What a model is: shapes, and the byte and FLOP accounting that planner, packer and benchmarks share.

A spec says nothing about where weights lie or how they are stored. Tensors have *logical names*, the same for every
family. `{i}` is the layer:

    vectors   (float32, always resident)
        norm.final  norm.final.bias
        norm.inputs [layer_inputs]  {i}.norm.input_post
        norm.token  norm.state                         of what a model that follows another is given
        {i}.norm.attention  {i}.norm.attention.bias  {i}.norm.ffn  {i}.norm.ffn.bias
        {i}.norm.attention_post  {i}.norm.ffn_post     of what blocks give (Gemma, OLMo 2)
        {i}.q_norm  {i}.k_norm                         [head_dim], or [heads * head_dim] and [kv_heads * head_dim]
        {i}.qkv.bias  {i}.out.bias  {i}.sinks [heads]
        {i}.gate.bias  {i}.up.bias  {i}.down.bias      one after the other of all experts
        {i}.router.bias  {i}.router.correction  {i}.router.scales    [experts]
        {i}.norm.router  {i}.norm.experts  {i}.norm.experts_post  {i}.norm.shared_post
        {i}.scale                                      [1], of the residual stream behind the layer
    matrices  (packed rows; y = W x)
        embed [vocab, hidden]   head [vocab, hidden] (absent when tied)   positions [rows, hidden] (learned)
        join [hidden, 2 hidden] (in place of embed and head where the model follows another)
        {i}.qkv [(heads + 2 kv_heads) * head_dim, hidden]                 query, then key, then value rows, if any
        {i}.gate [heads * head_dim, hidden]                               of what the heads give
        {i}.out [hidden, heads * head_dim]
        {i}.router [experts, hidden]   {i}.shared_gate [1, hidden]
        inputs.embed [vocab, layers * layer_inputs]   inputs.project [layers * layer_inputs, hidden]
        {i}.input_gate [layer_inputs, hidden]         {i}.input_out [hidden, layer_inputs]
    neurons   (packed bundles: gate row, up row, down column)
        {i}.ffn   [experts * neurons] bundles; expert e is the run starting at e * neurons
        {i}.shared  [shared] bundles: an expert that every token goes to

Of latent attention, queries are {i}.queries [heads * (nope_dim + rope_dim), hidden], or come by way of {i}.q_a
[query_rank, hidden] and {i}.q_b; {i}.kv_a [rank + rope_dim, hidden] gives latent and key, {i}.k_b [heads * rank,
nope_dim] and {i}.v_b [heads * value_dim, rank] take queries to latents and latents to values. {i}.q_a_norm and
{i}.kv_a_norm are norms of latents.

Of a gated delta net, {i}.qkv has the rows of queries, keys and values, {i}.beta and {i}.decay a row for each head; its
vectors are {i}.taps [taps, channels] (the oldest row's first), {i}.decay.rate and {i}.decay.bias [heads], and
{i}.head_norm [value_dim].

RMSNorm weights are stored as the factor that is multiplied (Gemma's `1 + w` is folded in when packing).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from flashrt.errors import UsageError
from flashrt.rope import MAX_CONTEXT, Rope, RopeScaling
from flashrt_kernels.activations import parse
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import LONGEST_ROW, MOST_TAPS, WIDEST_HEAD
from flashrt_kernels.rows import MATRIX_ROWS

MAX_LAYERS = 4096
MOST_EXPERTS = 1 << 14  # of a layer
GATES = (".beta", ".decay")  # ends of the names of matrices that say what the state of a delta net keeps
SCORES = ("softmax", "sigmoid")  # of a router's logits
ROUTING = (".router", ".shared_gate")  # ends of the names of matrices that weigh experts


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention of one layer. `window` counts the tokens a query sees, itself included (None: all)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None = None
    window: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False  # norms of queries and keys take all heads together, not each
    softcap: float = 0.0  # scores are bounded to this by tanh; 0: not bounded
    temperature: float = 0.0  # scores at position p are multiplied by 1 + this * log(1 + (p + first) // span)
    temperature_span: int = 0
    temperature_first: int = 0  # added to positions before
    qk_unit: bool = False  # queries and keys are divided by their root mean square, once rotated
    output_gate: bool = False  # what the heads give is multiplied by sigmoids of rows of their own
    sinks: bool = False  # each head has a score of its own beside those of its keys, whose value is zero
    keys_as_values: bool = False  # values are what is projected to keys, before these are normed and rotated
    value_norm: bool = False  # each value is divided by its root mean square
    kv_from: int | None = None  # the earlier layer whose keys and values it attends to; None: it has its own

    @property
    def row_width(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return (self.heads + 2 * self.kept_heads) * self.head_dim

    @property
    def kept_heads(self) -> int:
        """KV heads of which it keeps keys and values."""
        return self.kv_heads if self.kv_from is None else 0

    @property
    def qkv_rows(self) -> int:
        """Numbers of these that are projected."""
        return sum(self.qkv_parts)

    @property
    def qkv_parts(self) -> tuple[int, int, int]:
        """Rows of the projections to queries, keys and values."""
        keys = self.kept_heads * self.head_dim
        return self.heads * self.head_dim, keys, 0 if self.keys_as_values else keys

    @property
    def width(self) -> int:
        """Numbers that the heads give for a token."""
        return self.heads * self.head_dim

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Name → (rows, columns), in execution order."""
        gate = {"gate": (self.width, hidden)} if self.output_gate else {}
        return {"qkv": (self.qkv_rows, hidden), **gate, "out": (hidden, self.width)}

    @property
    def outputs(self) -> int:
        """How many of its matrices, the last ones, take what it attends to."""
        return 1

    @property
    def keys_only(self) -> bool:
        """Whether values are the first numbers of keys, so that a store holds keys alone."""
        return False

    @property
    def value_width(self) -> int:
        """Numbers of a value."""
        return self.head_dim

    def kv_pair(self, codec: KvCodec) -> tuple[int, int]:
        """Shape of what a store holds of a token for a KV head."""
        return codec.pair(self.head_dim, self.keys_only)

    def kv_bytes(self, codec: KvCodec) -> int:
        """Bytes of keys and values of a token."""
        return self.kv_heads * codec.nbytes(self.head_dim, self.keys_only)

    def vectors(self, hidden: int) -> dict[str, int]:
        """Name → length."""
        result: dict[str, int] = {}
        if self.qk_norm:
            queries, keys = (self.heads, self.kv_heads) if self.qk_norm_whole else (1, 1)
            result["q_norm"] = queries * self.head_dim
            if self.kv_from is None:
                result["k_norm"] = keys * self.head_dim
        if self.qkv_bias:
            result["qkv.bias"] = self.qkv_rows
        if self.out_bias:
            result["out.bias"] = hidden
        if self.sinks:
            result["sinks"] = self.heads
        return result

    def unsupported(self) -> str | None:
        """Why it cannot be computed, as one clause; None when it can."""
        if self.head_dim > WIDEST_HEAD:
            return f"heads of {self.head_dim} numbers are wider than the {WIDEST_HEAD} that kernels take"
        if self.softcap < 0:
            return "a negative soft cap"
        if self.temperature < 0 or (self.temperature and self.temperature_span < 1):
            return "an attention temperature without a span"
        if self.width > LONGEST_ROW:
            return f"{self.heads} heads of {self.head_dim} are more than the {LONGEST_ROW} that kernels take"
        return None


@dataclass(frozen=True, slots=True)
class LatentAttention(Attention):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), in its absorbed form.

    Of a token all heads share one key: a latent of `rank` numbers, which is its value too, then numbers that are
    rotated. Queries of `nope_dim` numbers are projected to latents, what they attend to is projected to `value_dim`
    numbers a head. So `kv_heads` is 1, `head_dim` the numbers of a key, and `rope.dims` says how many of the last ones
    are rotated.
    """

    rank: int = 0
    nope_dim: int = 0  # numbers of a head's query that are not rotated
    value_dim: int = 0  # numbers that a head gives
    query_rank: int = 0  # numbers that queries come by way of; 0: straight from the hidden state
    latent_eps: float = 1e-6  # of the norms of latents

    @property
    def outputs(self) -> int:
        return 2

    @property
    def keys_only(self) -> bool:
        return True

    @property
    def value_width(self) -> int:
        return self.rank

    @property
    def query_dim(self) -> int:
        """Numbers of a head's query, before its projection."""
        return self.nope_dim + self.head_dim - self.rank

    @property
    def row_width(self) -> int:
        return self.query_rank + self.heads * self.query_dim + self.head_dim

    @property
    def width(self) -> int:
        return self.heads * self.value_dim

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Name → (rows, columns), in execution order."""
        rows = self.heads * self.query_dim
        queries = {"queries": (rows, hidden)}
        if self.query_rank:
            queries = {"q_a": (self.query_rank, hidden), "q_b": (rows, self.query_rank)}
        latents = {"k_b": (self.heads * self.rank, self.nope_dim), "v_b": (self.width, self.rank)}
        return {**queries, "kv_a": (self.head_dim, hidden), **latents, "out": (hidden, self.width)}

    def vectors(self, hidden: int) -> dict[str, int]:
        """Name → length."""
        queries = {"q_a_norm": self.query_rank} if self.query_rank else {}
        return {**queries, "kv_a_norm": self.rank}

    def unsupported(self) -> str | None:
        """Why it cannot be computed, as one clause; None when it can."""
        if self.kv_heads != 1 or self.rope is None or self.rope.dims != self.head_dim - self.rank:
            return "latent attention without one key of a latent and rotated numbers for all heads"
        odd = self.window is not None or self.temperature or self.softcap or self.qkv_bias or self.out_bias
        if odd or self.qk_norm or self.qk_unit or self.output_gate or self.sinks:
            return "latent attention with what only other attention has"
        if self.head_dim > WIDEST_HEAD:
            return f"keys of {self.rank} + {self.rope.dims} numbers are wider than the {WIDEST_HEAD} that kernels take"
        for name, count in (("latents", self.rank), ("values", self.value_dim)):
            if count % MATRIX_ROWS:
                return f"{name} of {count} numbers, kernels take multiples of {MATRIX_ROWS}"
        if self.nope_dim > WIDEST_HEAD:
            return f"queries of {self.nope_dim} numbers are wider than the {WIDEST_HEAD} that kernels take"
        if max(self.width, self.query_rank) > LONGEST_ROW:
            return f"{self.heads} heads of {self.value_dim} are more than the {LONGEST_ROW} that kernels take"
        return None


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Gated delta net of one layer (Yang et al. 2024, arXiv 2412.06464): `heads` states of [key_dim, value_dim].

    Queries and keys of `key_heads` serve several heads each: neighbours, or where they are `tiled` every key_heads-th.
    All are mixed with those of the last rows by a convolution of `taps` taps.
    """

    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int = 4
    tiled: bool = False

    @property
    def qkv_parts(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values."""
        return self.key_heads * self.key_dim, self.key_heads * self.key_dim, self.width

    @property
    def channels(self) -> int:
        """Numbers of a token's queries, keys and values."""
        return sum(self.qkv_parts)

    @property
    def row_width(self) -> int:
        """Numbers of a token that its state is moved on by."""
        return self.channels + 2 * self.heads

    @property
    def width(self) -> int:
        """Numbers that the heads give for a token."""
        return self.heads * self.value_dim

    @property
    def outputs(self) -> int:
        """How many of its matrices, the last ones, take what its states give."""
        return 1

    @property
    def state_size(self) -> int:
        """Numbers of the state after a token, what the convolution needs of the rows before included."""
        return self.heads * self.key_dim * self.value_dim + (self.taps - 1) * self.channels

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """Name → (rows, columns), in execution order."""
        rows = {"qkv": self.channels, "gate": self.width, "beta": self.heads, "decay": self.heads}
        return {**{name: (count, hidden) for name, count in rows.items()}, "out": (hidden, self.width)}

    def vectors(self, hidden: int) -> dict[str, int]:
        """Name → length."""
        own = {"taps": self.taps * self.channels, "decay.rate": self.heads, "decay.bias": self.heads}
        return {**own, "head_norm": self.value_dim}

    def unsupported(self) -> str | None:
        """Why it cannot be computed, as one clause; None when it can."""
        if self.heads % self.key_heads:
            return f"{self.heads} heads of a delta net do not share {self.key_heads} key heads evenly"
        if not 2 <= self.taps <= MOST_TAPS:
            return f"a convolution of {self.taps} taps, kernels take 2 to {MOST_TAPS}"
        if max(self.key_dim, self.value_dim) > WIDEST_HEAD:
            return f"heads of {max(self.key_dim, self.value_dim)} numbers are wider than the {WIDEST_HEAD} of kernels"
        if self.width > LONGEST_ROW:
            return f"{self.heads} heads of {self.value_dim} are more than the {LONGEST_ROW} that kernels take"
        return None


Mixer = Attention | DeltaNet
"""What mixes the tokens of a sequence in one layer."""


@dataclass(frozen=True, slots=True)
class Ffn:
    """Feed-forward block of one layer: dense, or a mixture of `experts` of `neurons` neurons each.

    A router scores the experts: `router_scores` of logits, softmax over all or each one's sigmoid. Those of the highest
    scores are chosen, plus a correction that counts for the choice alone. Of `router_groups` groups of neighbours, only
    the experts in the `router_groups_used` whose `router_group_best` best have the highest sum take part.
    """

    neurons: int
    activation: str  # a name of flashrt_kernels.activations
    gated: bool = True
    bias: bool = False  # of all projections
    experts: int = 0
    experts_per_token: int = 0
    normalize_router: bool = False  # the chosen experts' scores are rescaled to sum to one
    router_scores: str = "softmax"  # a name of SCORES
    router_bias: bool = False  # of the logits
    router_correction: bool = False
    router_groups: int = 1
    router_groups_used: int = 1
    router_group_best: int = 2
    router_input: bool = False  # the score of the one expert chosen multiplies what it is given, not what it gives
    router_scale: float = 1.0  # of the chosen experts' scores, once rescaled
    expert_scales: bool = False  # each expert's score is multiplied by a number of its own besides
    router_norm: bool = False  # the router is given the residual stream, by a norm of its own
    router_logit_scale: float = 1.0
    branch_norms: bool = False  # experts and shared one are not given the same, and are normed before they are added
    shared: int = 0  # neurons of an expert that every token goes to; 0: there is none
    shared_gate: bool = False  # what it gives is multiplied by the sigmoid of a row of its own

    @property
    def bundle_rows(self) -> int:
        return 3 if self.gated else 2

    @property
    def gate_bias(self) -> bool:
        """Whether gates have biases."""
        return self.gated and self.bias

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of norms within the block."""
        branches = ("experts", "experts_post", "shared_post") if self.branch_norms else ()
        return (*(("router",) if self.router_norm else ()), *branches)

    @property
    def runs(self) -> int:
        """Runs of neurons: one per expert, one for a dense block."""
        return max(self.experts, 1)

    def unsupported(self) -> str | None:
        """Why the block cannot be computed, as one clause; None when it can."""
        if not (self.gated or parse(self.activation).gate_only):
            return f"an activation {self.activation!r} without a gate"
        if self.router_scores not in SCORES:
            return f"a router with scores by {self.router_scores!r}"
        if not self.experts and (self.shared or self.router_bias or self.router_correction or self.router_groups != 1):
            return "what belongs to a router without one"
        if self.router_input and self.experts_per_token != 1:
            return f"a router that weighs the input of {self.experts_per_token} experts"
        if self.shared_gate and not self.shared:
            return "a gate of a shared expert without one"
        if not self.experts and (self.expert_scales or self.router_norm or self.router_logit_scale != 1.0):
            return "what belongs to a router without one"
        if self.branch_norms and (not self.shared or self.router_input):
            return "norms of experts and of a shared one that are not given the normed stream each"
        if self.shared and self.bias:
            return "biases of experts beside a shared one"
        if self.router_groups == 1:
            return None
        each, rest = divmod(self.experts, self.router_groups)
        if rest or not 0 < self.router_group_best <= each or not 0 < self.router_groups_used <= self.router_groups:
            return f"{self.router_groups_used} of {self.router_groups} groups of {self.experts} experts"
        if each * self.router_groups_used < self.experts_per_token:
            return f"{self.experts_per_token} experts of {self.router_groups_used} groups of {each}"
        return None


@dataclass(frozen=True, slots=True)
class Layer:
    mixer: Mixer
    ffn: Ffn

    @property
    def attention(self) -> Attention:
        """The mixer of a layer that attends. Raises TypeError for one that does not."""
        if not isinstance(self.mixer, Attention):
            raise TypeError(f"a layer of kind {type(self.mixer).__name__} does not attend")
        return self.mixer


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer, with everything the engine needs to run it."""

    family: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    context: int  # the longest sequence the model supports
    norm: str = "rms"  # or 'layer'
    norm_eps: float = 1e-6
    norm_bias: bool = True  # layer norms add one
    pre_norms: bool = True  # of what blocks are given
    post_norms: bool = False  # of what blocks give
    parallel: bool = False  # the feed-forward block is given what the attention block is, by the same norm
    residual_scale: float = 1.0  # of what blocks give, once normed
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # scaled logits are bounded to this by tanh; 0: not bounded
    tied: bool = False
    positions: int = 0  # rows of the learned position table
    position_offset: int = 0  # row of the table that position 0 uses
    bos: int | None = None
    eos: tuple[int, ...] = ()
    longest: int = 0  # sequences beyond this are not what its layers say, however they are scaled; 0: no such bound
    layer_scales: bool = False  # the residual stream behind each layer is multiplied by a number of its own
    layer_inputs: int = 0  # numbers that each layer is given of a token beside the residual stream
    layer_input_scale: float = 1.0  # of those that the token's row holds
    follows: bool = False  # its layers are given a token's embedding and the state before it, of a model with the head

    def unsupported(self) -> str | None:
        """Why these shapes cannot be computed, as one clause; None when they can."""
        if self.hidden > LONGEST_ROW:
            return f"a hidden size of {self.hidden} is more than the {LONGEST_ROW} that kernels take"
        if self.logit_softcap < 0:
            return "a negative soft cap"
        for mixer in {layer.mixer for layer in self.layers}:
            if problem := mixer.unsupported():
                return problem
        for ffn in {layer.ffn for layer in self.layers}:
            if problem := ffn.unsupported():
                return problem
        for i, attention in self.attentions.items():
            if problem := self._borrowing_problem(i, attention):
                return problem
        if self.layer_inputs and self.norm != "rms":
            return "layer inputs beside layer norms"
        if self.follows and (self.layer_inputs or self.positions or self.norm != "rms" or self.delta_nets):
            return "layers that follow another model's and are given more than its states"
        if self.layer_inputs and self.layer_inputs * len(self.layers) > LONGEST_ROW:
            return f"{self.layer_inputs} numbers for each layer of a token are more than kernels take"
        if not all(parse(layer.ffn.activation).gate_only for layer in self.layers) and self.layer_inputs:
            return "layer inputs beside an activation that bounds what the gate is multiplied by"
        if self.positions and self.positions < self.context + self.position_offset:
            return (
                f"a table of {self.positions} positions, the first {self.position_offset} of them unused, "
                f"does not reach the end of a context of {self.context}"
            )
        return None

    def _borrowing_problem(self, i: int, attention: Attention) -> str | None:
        """Why layer `i` cannot attend to the keys and values of another, as one clause."""
        if attention.kv_from is None:
            return None
        if not 0 <= attention.kv_from < i or self.layers[attention.kv_from].mixer != replace(attention, kv_from=None):
            return f"layer {i} attends to what layer {attention.kv_from} keeps, which is none before it that is alike"
        return None

    def kv_layer(self, i: int) -> int:
        """The layer whose keys and values layer `i` attends to: itself for most."""
        mixer = self.layers[i].mixer
        return mixer.kv_from if isinstance(mixer, Attention) and mixer.kv_from is not None else i

    @property
    def attentions(self) -> dict[int, Attention]:
        """Of the layers that attend, by layer."""
        return {i: layer.mixer for i, layer in enumerate(self.layers) if isinstance(layer.mixer, Attention)}

    @property
    def latent(self) -> bool:
        """Whether some layers keep latents for keys and values."""
        return any(isinstance(layer.mixer, LatentAttention) for layer in self.layers)

    @property
    def delta_nets(self) -> dict[int, DeltaNet]:
        """Of the recurrent layers, by layer."""
        return {i: layer.mixer for i, layer in enumerate(self.layers) if isinstance(layer.mixer, DeltaNet)}

    def ending(self, tokens: Iterable[int]) -> ModelSpec:
        """The spec with further tokens that end an answer; those that the vocabulary lacks are left out."""
        known = (token for token in (*self.eos, *tokens) if token < self.vocab)
        return replace(self, eos=tuple(dict.fromkeys(known)))

    def scaled(self, scaling: RopeScaling) -> ModelSpec:
        """The spec with `scaling`, which replaces what its full layers have, and with the context that it gives.

        Raises UsageError where there is nothing to scale, or no length to scale from.
        """
        ropes = full_ropes(self.layers)
        if not ropes:
            raise UsageError(f"--rope-scaling {scaling}: this {self.family} model has no rotary embedding to scale")
        if self.latent:
            raise UsageError(
                f"--rope-scaling {scaling}: the scale of this {self.family} model's scores is that of its own rotary "
                "embedding: leave --rope-scaling out"
            )
        if any(rope.kind == "linear" for rope in ropes):
            raise UsageError(
                f"--rope-scaling {scaling}: this model's own scaling is linear, which does not say for how many tokens "
                "the model was trained: leave --rope-scaling out"
            )
        if any(rope.kind == "proportional" for rope in ropes):
            raise UsageError(
                f"--rope-scaling {scaling}: this model rotates a share of the pairs of each head, of which no scaling "
                "is known: leave --rope-scaling out"
            )
        trained = min(rope.original_context or self.context for rope in ropes)
        context = int(scaling.factor * trained)
        if self.longest and context > self.longest:
            raise UsageError(
                f"--rope-scaling {scaling}: of {self.family} no more than {self.longest} tokens are computed"
            )
        if context > MAX_CONTEXT:
            raise UsageError(f"--rope-scaling {scaling} of {trained} tokens gives more than {MAX_CONTEXT}: lower it")
        layers = tuple(
            replace(layer, mixer=replace(a, rope=replace(scaling.rope(a.rope.theta, trained), dims=a.rope.dims)))
            if isinstance(a := layer.mixer, Attention) and a.rope is not None and a.rope in ropes
            else layer
            for layer in self.layers
        )
        for attention in {layer.mixer for layer in layers}:
            if (
                isinstance(attention, Attention)
                and attention.rope is not None
                and (problem := attention.rope.problem(attention.head_dim, context))
            ):
                raise UsageError(f"--rope-scaling {scaling}: {problem}")
        return replace(self, layers=layers, context=context)

    def naming(self, experts: int) -> ModelSpec:
        """The spec whose routers name `experts` experts for each token, where that is fewer than they do.

        Raises UsageError where there is no router, or none that names so many.
        """
        most = self.experts_per_token
        if not 0 < experts <= most:
            what = f"names {most} experts a token, expected 1 to {most}" if most else "is no mixture of experts"
            raise UsageError(f"--experts-used {experts}: this {self.family} model {what}")
        ffns = [replace(a.ffn, experts_per_token=min(experts, a.ffn.experts_per_token)) for a in self.layers]
        layers = (replace(layer, ffn=ffn) for layer, ffn in zip(self.layers, ffns, strict=True))
        return replace(self, layers=tuple(layers))

    @property
    def experts_per_token(self) -> int:
        """The most experts that a router names for a token; 0 where there is none."""
        return max(layer.ffn.experts_per_token for layer in self.layers)

    def vectors(self) -> dict[str, int]:
        """Logical name → length of every vector, in the order in which they are stored."""
        norms = ("", ".bias") if self.norm == "layer" and self.norm_bias else ("",)
        result = {f"norm.final{suffix}": self.hidden for suffix in norms}
        if self.layer_inputs:
            result["norm.inputs"] = self.layer_inputs
        if self.follows:
            result |= {"norm.token": self.hidden, "norm.state": self.hidden}
        for i, layer in enumerate(self.layers):
            ffn = layer.ffn
            for name in ("attention", "ffn"):
                if self.input_norm(i, name) == f"{i}.norm.{name}":
                    result |= {f"{i}.norm.{name}{suffix}": self.hidden for suffix in norms}
                if self.post_norms:
                    result |= {f"{i}.norm.{name}_post{suffix}": self.hidden for suffix in norms}
            beside = ("input_post",) if self.layer_inputs else ()
            result |= {f"{i}.norm.{name}{suffix}": self.hidden for name in (*ffn.norms, *beside) for suffix in norms}
            if self.layer_scales:
                result[f"{i}.scale"] = 1
            result |= {f"{i}.{name}": length for name, length in layer.mixer.vectors(self.hidden).items()}
            if ffn.bias:
                gate = {f"{i}.gate.bias": ffn.runs * ffn.neurons} if ffn.gate_bias else {}
                result |= gate | {f"{i}.up.bias": ffn.runs * ffn.neurons, f"{i}.down.bias": ffn.runs * self.hidden}
            if ffn.router_bias:
                result[f"{i}.router.bias"] = ffn.experts
            if ffn.router_correction:
                result[f"{i}.router.correction"] = ffn.experts
            if ffn.expert_scales:
                result[f"{i}.router.scales"] = ffn.experts
        return result

    def input_norm(self, i: int, block: str) -> str | None:
        """Logical name of the norm of what `block` ('attention' or 'ffn') of layer `i` is given; None without one."""
        if not self.pre_norms:
            return None
        return f"{i}.norm.attention" if self.parallel else f"{i}.norm.{block}"

    def shared_matrices(self) -> dict[str, tuple[int, int]]:
        """Logical name → (rows, columns) of the matrices that belong to no layer."""
        if self.follows:
            return {"join": (self.hidden, 2 * self.hidden)}
        result = {"embed": (self.vocab, self.hidden)}
        if not self.tied:
            result["head"] = (self.vocab, self.hidden)
        if self.positions:
            result["positions"] = (self.positions, self.hidden)
        if self.layer_inputs:
            width = len(self.layers) * self.layer_inputs
            result |= {"inputs.embed": (self.vocab, width), "inputs.project": (width, self.hidden)}
        return result

    def layer_matrices(self, i: int) -> dict[str, tuple[int, int]]:
        """Logical name → (rows, columns) of layer `i`'s matrices, in execution order."""
        mixer, ffn = self.layers[i].mixer, self.layers[i].ffn
        result = {f"{i}.{name}": shape for name, shape in mixer.matrices(self.hidden).items()}
        if ffn.experts:
            result[f"{i}.router"] = (ffn.experts, self.hidden)
        if ffn.shared_gate:
            result[f"{i}.shared_gate"] = (1, self.hidden)
        if self.layer_inputs:
            result[f"{i}.input_gate"] = (self.layer_inputs, self.hidden)
            result[f"{i}.input_out"] = (self.hidden, self.layer_inputs)
        return result

    def layer_neurons(self, i: int) -> dict[str, tuple[int, int]]:
        """Logical name → (runs, neurons of each) of layer `i`'s neurons, in execution order."""
        ffn = self.layers[i].ffn
        result = {f"{i}.shared": (1, ffn.shared)} if ffn.shared else {}
        return result | {f"{i}.ffn": (ffn.runs, ffn.neurons)}

    @property
    def head(self) -> str:
        """Logical name of the matrix that turns hidden states into logits."""
        return "embed" if self.tied else "head"

    @property
    def parameters(self) -> int:
        """Weights in matrices and neurons; a tied matrix counts once."""
        total = sum(rows * columns for rows, columns in self.shared_matrices().values())
        for i, layer in enumerate(self.layers):
            total += sum(rows * columns for rows, columns in self.layer_matrices(i).values())
            neurons = sum(runs * each for runs, each in self.layer_neurons(i).values())
            total += neurons * layer.ffn.bundle_rows * self.hidden
        return total

    def kv_bytes_per_token(self, codec: KvCodec) -> int:
        """Bytes of keys and values of one token over all layers."""
        return sum(a.kv_bytes(codec) for a in self.attentions.values() if a.kept_heads)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; equal layers are written once, with a count."""
        data = _without_additions(self)
        runs: list[dict[str, Any]] = []
        for layer, own in zip(data["layers"], self.layers, strict=True):
            ffn = _without_additions(own.ffn)
            layer = {_MIXERS[type(own.mixer)]: mixer_json(own.mixer), "ffn": ffn}
            if runs and runs[-1]["layer"] == layer:
                runs[-1]["count"] += 1
            else:
                runs.append({"count": 1, "layer": layer})
        data["layers"] = runs
        data["eos"] = list(self.eos)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelSpec:
        """The inverse of `to_json`. Raises TypeError, KeyError or ValueError when fields are missing or unknown."""
        values = dict(data)
        layers: list[Layer] = []
        for run in values["layers"]:
            mixer, ffn = _mixer_from_json(run["layer"]), Ffn(**run["layer"]["ffn"])
            count = run["count"]
            if not isinstance(count, int) or not 0 < count <= MAX_LAYERS - len(layers):
                raise ValueError(f"a run of {count!r} layers after {len(layers)}, expected at most {MAX_LAYERS} in all")
            layers += [Layer(mixer, ffn)] * count
        values["layers"] = tuple(layers)
        values["eos"] = tuple(values["eos"])
        return cls(**values)


# Written only where they say something: a pack keeps its hash, to which sessions and labels are bound.
_ADDITIONS = {
    ModelSpec: (
        "norm_bias",
        "pre_norms",
        "parallel",
        "residual_scale",
        "logit_scale",
        "logit_softcap",
        "longest",
        "layer_scales",
        "layer_inputs",
        "layer_input_scale",
        "follows",
    ),
    Attention: (
        "qk_norm_whole",
        "softcap",
        "temperature",
        "temperature_span",
        "temperature_first",
        "qk_unit",
        "output_gate",
        "sinks",
        "keys_as_values",
        "value_norm",
        "kv_from",
    ),
    DeltaNet: (),
    Ffn: (
        "router_scores",
        "router_bias",
        "router_correction",
        "router_groups",
        "router_groups_used",
        "router_group_best",
        "router_scale",
        "router_input",
        "expert_scales",
        "router_norm",
        "router_logit_scale",
        "branch_norms",
        "shared",
        "shared_gate",
    ),
}
_ADDITIONS[LatentAttention] = _ADDITIONS[Attention]
_MIXERS: dict[type, str] = {
    Attention: "attention",
    LatentAttention: "latent_attention",
    DeltaNet: "delta_net",
}


def mixer_json(mixer: Mixer) -> dict[str, Any]:
    """A JSON object of a mixer's fields."""
    data = _without_additions(mixer)
    if isinstance(mixer, Attention):
        data["rope"] = None if mixer.rope is None else mixer.rope.to_json()
    return data


def _mixer_from_json(layer: dict[str, Any]) -> Mixer:
    """The mixer of a layer, which has one of _MIXERS beside "ffn". Raises ValueError and KeyError."""
    (name,) = set(layer) - {"ffn"}
    mixer = dict(layer[name])
    if mixer.get("rope") is not None:
        mixer["rope"] = Rope.from_json(mixer["rope"])
    return {own: kind for kind, own in _MIXERS.items()}[name](**mixer)


def _without_additions(part: ModelSpec | Mixer | Ffn) -> dict[str, Any]:
    """The fields of a part of a spec, without those of _ADDITIONS that hold their defaults."""
    defaults = {item.name: item.default for item in fields(part)}
    added = _ADDITIONS[type(part)]
    return {name: value for name, value in asdict(part).items() if name not in added or value != defaults[name]}


def full_ropes(layers: Iterable[Layer]) -> set[Rope]:
    """The ropes of the layers that see every token; of all layers where each sees a window."""
    attentions = [layer.mixer for layer in layers if isinstance(layer.mixer, Attention)]
    full = [attention for attention in attentions if attention.window is None] or attentions
    return {attention.rope for attention in full if attention.rope is not None}
