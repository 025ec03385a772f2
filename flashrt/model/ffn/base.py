"""What the decoder knows of a feed-forward block, whatever kind it is of.

A kind is a class for all its blocks in a model (`FfnKind`) and one for each of them (`FfnBlock`). Which layer is of
which kind is decided once, when the model is built (`flashrt.model.ffn.choose`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from flashrt.cache.device import Progress
from flashrt.cache.streamer import Submit
from flashrt.model.heads import Chosen
from flashrt.model.workspace import Tensor, Workspace
from flashrt.storage.layout import Block, TensorLayout

Array = np.ndarray
Take = Callable[[TensorLayout], Iterable[tuple[int, Tensor]]]  # bundles of one run of a tensor, each with its number


class Tokens(NamedTuple):
    """The tokens of a pass, beside the block's input."""

    positions: Array  # int64 [T]
    residual: Tensor  # the residual stream before the block, float32 [T, hidden]


class BeforeAttention(Protocol):
    """What a block may do in a pass of few tokens before the attention of its layer is computed."""

    def look_ahead(self, residual: Tensor) -> None:
        """Read ahead what the block will probably need, by the residual stream before attention."""

    def choose_heads(self, x: Tensor, positions: Array) -> Chosen | None:
        """Heads that take part, by the input of the attention (float32 [T, hidden]); None: all."""


class FfnBlock(ABC):
    """The feed-forward block of layer `i`. A kind overrides what differs from a block whose weights simply stream.

    x is the normed input, and what the block gives is added to y, both float32 [T, hidden]. Weights that it takes from
    the ring are taken in the order of `expect`; a draft takes none.
    """

    submit: Submit | None = None  # starts reads of what it expects, where that is not whole blocks
    partial = False  # whether passes of few tokens take other blocks from the ring than those of many
    mixes = False  # whether a pass may have rows of both kinds

    def __init__(self, work: Workspace, i: int) -> None:
        self.work, self.i = work, i
        self.weights, self.ffn = work.weights, work.spec.layers[i].ffn
        self.bias: Tensor | None = self.weights.vector(f"{i}.up.bias") if self.ffn.bias else None
        self.gate_bias = self.weights.vector(f"{i}.gate.bias") if self.ffn.gate_bias else None
        self.down_bias = self.weights.vector(f"{i}.down.bias") if self.ffn.bias else None

    @property
    def before_attention(self) -> BeforeAttention | None:
        """What it does in narrow passes before the attention of its layer; None for most."""
        return None

    @property
    def tensors(self) -> Sequence[str]:
        """Names of its weights, in the order in which it takes them."""
        return (f"{self.i}.ffn",)

    @property
    def output_bias(self) -> Tensor | None:
        """What is added for every token behind the block, float32 [hidden]."""
        return self.down_bias

    def expect(self, wide: bool) -> Iterable[Block]:
        """What a pass of few or of many tokens (`wide`) takes from the ring, in order; gone through as it is read."""
        return self.weights.streamed(self.tensors)

    @abstractmethod
    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        """y += block of x, for many tokens."""

    @abstractmethod
    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        """y += block of x, for few tokens; a token's result does not depend on the others."""

    def mix(self, x: Tensor, y: Tensor, wide: int) -> None:
        """y += block of x, of which the first `wide` rows are computed as many tokens, the others as few.

        For blocks that say so (`mixes`).
        """
        raise NotImplementedError

    def draft(self, x: Tensor, y: Tensor) -> None:
        """y += something like the block of x, for few tokens, without taking anything from the ring.

        A kind that has nothing of the sort adds nothing.
        """


class FfnKind(ABC):
    """All blocks of one kind in a model, those of `layers`. A kind overrides what it has to say.

    It is made once pinned blocks are in memory, and takes memory of its own from the ledger by `work.device.allocate`.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ()  # names of what `figures` gives

    blocks: Mapping[int, FfnBlock]

    @classmethod
    @abstractmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        """Whether layer `i` is of this kind, by spec, manifest and plan."""

    @abstractmethod
    def __init__(self, work: Workspace, layers: Sequence[int]) -> None: ...

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads of its own, those through the ring left out."""
        return 0.0

    def load(self, arrived: Progress) -> None:
        """Read what it keeps in memory beside pinned blocks; `arrived` is told the bytes of each block."""

    def cancel(self) -> None:
        """Forget what is being read: a pass was left half-way, or another comes than was read ahead for."""

    def counts(self) -> Counter[str]:
        """What it has counted so far, by name."""
        return Counter()

    def figures(self, counts: Counter[str]) -> dict[str, Any]:
        """Figures of a request for its report, by the names in FIGURES; `counts` were added while it decoded."""
        return {}

    def remarks(self, figures: Mapping[str, Any]) -> list[str]:
        """What the closing line of `flashrt run` says of such figures."""
        return []
