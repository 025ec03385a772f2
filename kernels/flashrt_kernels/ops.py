"""The operations every backend has, and the choice of a backend.

Arrays are the backend's: numpy arrays for `cpu`, torch tensors for `torch`. Strides are documented where they are
checked, in `flashrt_kernels.cpu`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast, overload

from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import Codec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

BACKENDS = {"cpu": "flashrt_kernels.cpu", "torch": "flashrt_kernels.reference"}

Array = TypeVar("Array")


class BackendUnavailable(RuntimeError):
    """A backend cannot be used here; the message says why and what to do."""


class Ops(Protocol[Array]):
    """A backend. Results are written into arrays of the caller's.

    B tokens, K numbers a row, D numbers a head, C columns of channel groups, n bundles of `flashrt_kernels.rows` (uint8
    [n, bytes]). Floats are float32; keys and values may be bfloat16, as uint16 bits for `cpu`. Few tokens are 1 to 16.
    Where the CPU's backend gets an array of another shape, dtype or stride, it raises a ValueError that names it.
    """

    def linear(
        self, x: Array, bundles: Array, codec: Codec, out: Array, row0: int, rows: int, bias: Array | None = None
    ) -> None:
        """out[b, row0 + r] = x[b] · W[r] + bias[r], few tokens; x [B, K], bundles [n, bytes], out [B, any]."""

    def linear_by_head(self, x: Array, bundles: Array, codec: Codec, out: Array, row0: int, rows: int) -> None:
        """out[b, h] = x[b, h] · W[h N : (h + 1) N], few tokens, of what rows row0 to row0 + rows of W give.

        x [B, H, K], out [B, H, N], bundles [n, bytes] from row0 on; N, row0 and rows are whole bundles.
        """

    def gemm_linear(
        self,
        x: Array,
        bundles: Array,
        codec: Codec,
        out: Array,
        row0: int,
        rows: int,
        bias: Array | None = None,
        scratch: Array | None = None,
    ) -> None:
        """`linear` for many tokens; scratch uint8 [gemm_scratch_bytes(B, K)], None: it allocates."""

    def linear_add(
        self,
        x: Array,
        rows: Array,
        codec: Codec,
        group: int,
        y: Array,
        row0: int,
        tokens: Array | None = None,
    ) -> None:
        """y[tokens[b], row0 + r] += x[b] · rows[r], few tokens; x [B, K], rows uint8 [n, bytes] of a kept codec.

        Sums are those that `glu` takes of bundles of `group` neurons. tokens int32 [B], None: all.
        """

    def gemm_linear_add(
        self,
        x: Array,
        rows: Array,
        codec: Codec,
        group: int,
        y: Array,
        row0: int,
        tokens: Array | None = None,
        scratch: Array | None = None,
    ) -> None:
        """`linear_add` for many tokens; scratch uint8 [gemm_scratch_bytes(B, K)], None: it allocates."""

    def gemm_scratch_bytes(self, tokens: int, k: int, neurons: int = 0) -> int:
        """Bytes of scratch of `gemm_linear` on `tokens` rows of k numbers, or with `neurons` that of `gemm_glu`."""

    def glu(
        self,
        x: Array,
        weights: FfnWeights[Array],
        y: Array,
        routed: RoutedTokens[Array] | None = None,
        slots: Array | None = None,
        streamed_bundles: Sequence[Array] | None = None,
        usage: Array | None = None,
    ) -> None:
        """y[b] += h · down of each neuron, few tokens; x, y [B, K].

        h is that of `FfnWeights`; where only the tokens `routed` take part, it is multiplied by their factors.
        slots int32 [s] names the bundles that take part (None: all): i >= 0 is bundle i of the weights, -1 - i bundle
        i of the arrays `streamed_bundles`, numbered one after the other. usage [s] += their |h|, summed over the
        neurons of a bundle.
        """

    def gemm_glu(
        self,
        x: Array,
        weights: FfnWeights[Array],
        y: Array,
        routed: RoutedTokens[Array] | None = None,
        scratch: Array | None = None,
        usage: Array | None = None,
    ) -> None:
        """`glu` for many tokens; scratch uint8 [gemm_scratch_bytes(tokens, K, n)]."""

    def gate_up(
        self,
        x: Array,
        groups: Array,
        first: int,
        fine: int,
        order: Array,
        norms: Array,
        ratio: Array,
        sums: Array,
        coarse_from: float,
        fine_from: float,
    ) -> tuple[int, int]:
        """sums[b] += gate and up of x[b] by input channel (`flashrt_kernels.channels`), few tokens.

        Channels take part from |x| * norm >= coarse_from on, with their fine halves from fine_from on. x [B, K], groups
        [n, bytes] of which `first` is the first, order int32 [places], norms [K], ratio [C], sums [B, C]. Returns how
        many coarse and fine halves took part.
        """

    def gemm_gate_up(
        self,
        x: Array,
        groups: Array,
        first: int,
        fine: int,
        order: Array,
        ratio: Array,
        sums: Array,
        scratch: Array | None = None,
    ) -> None:
        """`gate_up` for many tokens, of all channels; scratch uint8 [gate_up_scratch_bytes(B, n)]."""

    def gate_up_scratch_bytes(self, tokens: int, groups: int) -> int:
        """Bytes of scratch of `gemm_gate_up` for `tokens` tokens on `groups` groups."""

    def down(
        self,
        sums: Array,
        scale: Array,
        norms: Array,
        activation: str,
        gated: bool,
        up_bias: Array | None,
        rows: Array,
        codec: Codec,
        first: int,
        y: Array,
        threshold: float,
    ) -> int:
        """y[b] += h * row, few tokens, where |h| * norm >= threshold; returns how many neurons that were.

        sums [B, C] of `gate_up`, scale [C], norms and up_bias [neurons], rows [n, bytes] of which `first` is the first.
        """

    def gemm_down(
        self,
        sums: Array,
        scale: Array,
        norms: Array,
        activation: str,
        gated: bool,
        up_bias: Array | None,
        rows: Array,
        codec: Codec,
        first: int,
        y: Array,
        scratch: Array | None = None,
    ) -> None:
        """`down` for many tokens, of all neurons; scratch uint8 [gemm_scratch_bytes(B, K, n)]."""

    def rms_norm(self, x: Array, weight: Array, eps: float, out: Array) -> None:
        """out = x / sqrt(mean(x²) + eps) * weight over rows; x, out [B, K], weight [K]."""

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float, out: Array) -> None:
        """out = (x - mean) / sqrt(variance + eps) * weight + bias over rows; x, out [B, K], weight, bias [K]."""

    def softcap(self, x: Array, cap: float) -> None:
        """x = cap * tanh(x / cap) in place, x [B, K]."""

    def rms_norm_gated(self, x: Array, gate: Array, weight: Array, eps: float, out: Array) -> None:
        """out = x / sqrt(mean(x²) + eps) * weight * silu(gate) over rows; x, gate, out [B, K], weight [K]."""

    def activate(self, gate: Array, up: Array | None, activation: str) -> None:
        """gate = act(gate) * up in place, gate and up [B, K]; up None: ones.

        activation: a name of `flashrt_kernels.activations`
        """

    def sigmoid_gate(self, x: Array, gate: Array) -> None:
        """x *= sigmoid(gate) in place, x and gate [B, K]."""

    def delta_rule(
        self,
        x: Array,
        gates: Array,
        taps: Array,
        rate: Array,
        bias: Array,
        tiled: bool,
        state: Array,
        tail: Array,
        out: Array,
        advance: int,
        parents: Array | None = None,
        scratch: Array | None = None,
    ) -> None:
        """A gated delta net over rows; the first `advance` of them move its state on, the others leave no trace in it.

        Channels x [N, C] are queries and keys of the key heads (D each), then values of H heads (V each). Each becomes
        silu of the sum of `taps` [n, C] times itself in the last n rows; tail [n - 1, C] has those before the first.
        Queries and keys are divided by their lengths, queries by sqrt(D) too. gates [N, 2 H] are b and a of each head:
        state [H, D, V] is multiplied by exp(rate * softplus(a + bias)), then k * sigmoid(b) * (v - k · state) is added
        to it, and out is q · state. Head h reads key head h % key heads where they are `tiled`, or neighbours share
        one. out [M, H * V] takes the last M rows. parents int32 [N - advance], at most 16, makes the rows behind
        `advance` a tree, as in `attention`. x and gates are used up. scratch uint8 [delta_rule_scratch_bytes(C, n, D)].
        """

    def delta_rule_scratch_bytes(self, channels: int, taps: int, dim: int) -> int:
        """Bytes of scratch of `delta_rule`, for any number of rows."""

    def rope(self, x: Array, cos: Array, sin: Array) -> None:
        """Rotates the halves of each head in place; x [B, heads, D], cos, sin [B, D / 2]."""

    def kv_append(self, k: Array, v: Array | None, kv: Array, start: int) -> None:
        """Writes k, v [B, KVH, D] from position `start` on into kv [KVH, context, *pair] (`flashrt_kernels.kv`).

        v is None where kv holds keys only.
        """

    def attention(
        self,
        q: Array,
        kv: Array,
        start: int,
        window: int | None,
        scale: float,
        softcap: float | None,
        out: Array,
        scratch: Array | None = None,
        parents: Array | None = None,
        state: Array | None = None,
        sinks: Array | None = None,
        wide: bool = False,
    ) -> None:
        """Causal attention of q [B, H, D], from position `start` on, over kv [KVH, context, *pair]; out [B, H * V].

        V, D at most: the numbers of a value that are wanted, the first ones. window: positions that a query sees, its
        own included; None: all before it. scale multiplies scores, softcap bounds them (None: not). parents int32 [B]
        makes the tokens a tree: each follows the one that is named, or with -1 the sequence. state: what `attend_page`
        has gathered of positions before those of kv (None: nothing). sinks [H]: scores that each head has beside those
        of its keys, and whose values are zero; not beside a state. wide: the tokens are part of a pass of many, which
        may round otherwise than one of few, but alike however it is cut.
        """

    def attend_page(
        self,
        q: Array,
        page: Array,
        scale: float,
        softcap: float | None,
        state: Array,
        first: bool,
        scratch: Array | None = None,
        sinks: Array | None = None,
        wide: bool = False,
    ) -> None:
        """Takes positions that all of q [B, H, D] sees, page [KVH, n, *pair], into state [B, H, its width].

        In the order of positions, all pages but the last a multiple of 256 long; before the `first` nothing is in
        state, or the sinks. The width says which V the values have. `attention` that begins from state then gives the
        bits of one over everything. scratch is that of `attention`.
        """

    def attention_state_width(self, values: int) -> int:
        """Numbers of the running softmax of one query, of so many numbers of a value."""

    def attention_scratch_bytes(self, tokens: int, heads: int, kv_heads: int, dim: int) -> int:
        """Bytes of scratch of `attention` for q [tokens, heads, dim], whatever the context."""

    def attention_list(
        self,
        q: Array,
        near: Array,
        far: Array | None,
        lists: Array,
        counts: Array,
        scale: float,
        softcap: float | None,
        out: Array,
        scratch: Array | None = None,
        sinks: Array | None = None,
    ) -> None:
        """Attention of q [T, H, D] over lists of tokens, one for each row and KV head; out [T, H * V].

        lists int32 [T, KVH, most], of which counts int32 [T, KVH] are there, attended to in their order: i >= 0 is
        near[head, i] of [KVH, slots, *pair], -1 - i is far[i] of [tokens, *pair] (None: none). An empty list gives
        zeros; 0, 1, .. p gives the bits of `attention` at position p. sinks [H]: those of `attention`.
        """

    def attention_list_scratch_bytes(self, tokens: int, heads: int, kv_heads: int, dim: int) -> int:
        """Bytes of scratch of `attention_list` for q [tokens, heads, dim], whatever the lists."""

    def label_append(self, values: Array, low: Array, step: Array, labels: Array, position: int) -> None:
        """Encodes values [n, KVH, r] into labels (`flashrt_kernels.labels`) from `position` on; low, step [KVH, r].

        A code is (value - low) / step, rounded half to even, within 0 to 15.
        """

    def select(
        self,
        q: Array,
        labels: Array,
        step: Array,
        scale: float,
        first: int,
        ends: Array,
        keep: Array,
        block: int,
        chosen: Array,
        counts: Array,
        scratch: Array | None = None,
    ) -> None:
        """The keep[t, h] heaviest blocks of tokens, ascending, into chosen int32 [T, KVH, most].

        q [T, H, r] of labels, step [KVH, r]. Candidates of row t are blocks first to ends[t] - 1 of `block` tokens. A
        block weighs what the softmax of scores over all candidates' tokens gives it, summed over the queries that share
        the KV head; of equals the earlier goes first. ends int32 [T], keep int32 [T, KVH]; counts int32 [T, KVH] says
        how many were chosen: keep, or all candidates.
        """

    def select_scratch_bytes(self, heads: int, kv_heads: int, context: int, block: int) -> int:
        """Bytes of scratch of `select` on labels of `context` positions, for any number of rows."""

    def quantize(self, weights: Array, codec: Codec, out: Array, importance: Array | None = None) -> None:
        """Encodes weights [n, K] into out uint8 [n, row_bytes]; importance [K] weighs the columns' errors."""

    def dequantize(self, rows: Array, codec: Codec, k: int, out: Array) -> None:
        """Decodes rows uint8 [n, ≥ row_bytes], of k numbers each, into out [n, k]."""

    def reserve(self, k: int) -> int:
        """Allocates what `linear` and `glu` keep between calls for rows of up to k numbers; returns the bytes."""

    def reserve_groups(self) -> int:
        """Allocates what `glu` keeps besides for bundles of more than one neuron; returns the bytes."""

    def set_threads(self, n: int) -> None:
        """Threads that share each operation from now on, the caller's included."""

    def threads(self) -> int:
        """Threads that share each operation."""

    def isa(self) -> str:
        """The instruction set, or the device, in use."""


if TYPE_CHECKING:  # the backends are what Ops says
    from flashrt_kernels import cpu, reference

    _CPU: Ops[NDArray[Any]] = cpu
    _TORCH: Ops[Tensor] = reference


@overload
def load(name: Literal["cpu"]) -> Ops[NDArray[Any]]: ...
@overload
def load(name: Literal["torch"]) -> Ops[Tensor]: ...
@overload
def load(name: str) -> Ops[Any]: ...
def load(name: str) -> Ops[Any]:
    """The backend `name`: 'cpu' (numpy, C++) or 'torch' (any device). Raises BackendUnavailable with the reason."""
    if name not in BACKENDS:
        raise BackendUnavailable(f"no backend {name!r}: expected one of {', '.join(BACKENDS)}")
    try:
        return cast("Ops[Any]", importlib.import_module(BACKENDS[name]))
    except ImportError as error:
        if name == "cpu":
            remedy = "the compiled extension is missing: build it with `pip install .` (needs a C++17 compiler)"
        else:
            remedy = "torch is missing: install it with `pip install 'flashrt[torch]'`"
        raise BackendUnavailable(f"backend {name!r} is unavailable ({error}); {remedy}") from error
