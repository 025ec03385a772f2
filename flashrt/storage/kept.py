"""Which tensors of a pack have the codec of the file that they come from, code for code, and which could not keep it.

What is not named here has the pack's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from flashrt.errors import PackError
from flashrt.spec import GATES, ROUTING, ModelSpec
from flashrt_kernels.limits import LARGEST_GROUP
from flashrt_kernels.rows import KEPT, Codec, NeuronCodecs

STORED = {codec.value.upper(): codec for codec in KEPT}  # by the names of ggml's types
SMALL_GROUP = (
    128  # neurons of a bundle where blocks are shorter, if the neurons of a layer are as many as that, or half
)
PLAIN = {"F64", "F32", "F16", "BF16"}  # of which nobody expects that a pack keeps them
DOWN = Codec.INT8  # of down where it has to be quantized again: what that costs cannot be measured


class Stored(Protocol):
    """What a checkpoint says of how its weights are stored; see `sources.checkpoint`."""

    spec: ModelSpec

    def part_dtypes(self, key: str) -> tuple[str, ...]: ...
    def neuron_dtypes(self, key: str) -> tuple[str, str, str]: ...


@dataclass(frozen=True, slots=True)
class Kept:
    """Tensor → its codec, or its neurons' codecs; and what could not be kept → what it was stored as.

    A matrix whose parts differ is stored in parts, which have names of their own (`parts_of`).
    """

    matrices: dict[str, Codec]
    neurons: dict[str, NeuronCodecs]
    requantized: dict[str, str]

    @property
    def codecs(self) -> list[Codec]:
        """All kept codecs that occur, in the order of their declaration."""
        found = set(self.matrices.values())
        for codecs in self.neurons.values():
            found |= {codec for codec in (codecs.gate, codecs.up, codecs.down) if codec is not None}
        return [codec for codec in Codec if codec in found & set(KEPT)]

    def to_json(self) -> dict[str, Any]:
        return {
            "matrices": {name: codec.value for name, codec in self.matrices.items()},
            "neurons": {
                name: {
                    "gate": None if codecs.gate is None else codecs.gate.value,
                    "up": codecs.up.value,
                    "down": codecs.down.value,
                    "group": codecs.group,
                }
                for name, codecs in self.neurons.items()
            },
            "requantized": dict(self.requantized),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], where: str) -> Kept:
        """The inverse of `to_json`. Raises PackError naming a codec that is not known, KeyError for what is missing."""

        def codec(name: str, value: object) -> Codec:
            try:
                return Codec(value)
            except ValueError:
                raise PackError(
                    f"{where}: {name} is in the format {value!r}, which this flashrt does not know: "
                    "use a newer flashrt, or pack the checkpoint again with --dtype int8"
                ) from None

        neurons = {
            name: NeuronCodecs(
                None if own["gate"] is None else codec(name, own["gate"]),
                codec(name, own["up"]),
                codec(name, own["down"]),
                own["group"],
            )
            for name, own in data["neurons"].items()
        }
        matrices = {name: codec(name, value) for name, value in data["matrices"].items()}
        return cls(matrices, neurons, {str(name): str(stored) for name, stored in data["requantized"].items()})

    def problem(self, spec: ModelSpec) -> str | None:
        """Why these cannot be the codecs of a pack of this model, as one clause; None when they can."""
        known = dict(spec.shared_matrices())
        for i in range(len(spec.layers)):
            known |= spec.layer_matrices(i)
        for name, codec in self.matrices.items():
            shape = known.get(name) or known.get(whole_of(name))
            if shape is None:
                return f"{name} is no matrix of this model"
            if problem := _blocks_problem(name, codec, shape[1]):
                return problem
        for name, codecs in self.neurons.items():
            layer = name.partition(".")[0]
            known_layer = layer.isdecimal() and int(layer) < len(spec.layers)
            found = spec.layer_neurons(int(layer)).get(name) if known_layer else None
            if found is None:
                return f"{name} is no feed-forward block of this model"
            gated = spec.layers[int(layer)].ffn.gated
            if problem := _neurons_problem(name, codecs, gated, found[1], spec.hidden):
                return problem
        return None


def whole_of(part: str) -> str:
    """The matrix that a part belongs to, by the part's name."""
    layer, _, name = part.partition(".")
    return f"{layer}.qkv" if name in ("q", "k", "v") else part


def parts_of(matrix: str) -> list[str]:
    """Names of the parts that a matrix may be stored in; itself where it has none."""
    return [matrix.replace("qkv", part) for part in "qkv"] if matrix.endswith(".qkv") else [matrix]


def kept_of(source: Stored) -> Kept | None:
    """What of a checkpoint can be kept, and what of a quantized one cannot; None where there is nothing of either."""
    spec = source.spec
    names = [*spec.shared_matrices()]
    for i in range(len(spec.layers)):
        names += [name for name in spec.layer_matrices(i) if not name.endswith(ROUTING)]
    kept = Kept({}, {}, {})
    for name in names:
        stored = source.part_dtypes(name)
        if not name.endswith(GATES) or stored[0] in STORED:  # else these are as routers are
            _keep_matrix(kept, name, stored)
    for i, layer in enumerate(spec.layers):
        for name, (_, neurons) in spec.layer_neurons(i).items():
            _keep_neurons(kept, name, neurons, layer.ffn.gated, source.neuron_dtypes(name))
    quantized = any(set(stored.split("/")) - PLAIN for stored in kept.requantized.values())
    return kept if kept.matrices or kept.neurons or quantized else None


def _keep_matrix(kept: Kept, name: str, stored: tuple[str, ...]) -> None:
    alike = len(set(stored)) == 1
    for part, dtype in zip([name] if alike else parts_of(name), stored, strict=False):
        if dtype in STORED:
            kept.matrices[part] = STORED[dtype]
        else:
            kept.requantized[part] = dtype


def _keep_neurons(kept: Kept, name: str, neurons: int, gated: bool, stored: tuple[str, str, str]) -> None:
    gate, up, down = (STORED.get(dtype) for dtype in stored)
    parts = {f"{name}.{part}": dtype for part, dtype in zip(("gate", "up", "down"), stored, strict=True) if dtype}
    if up is None or (gated and gate is None):
        kept.requantized.update(parts)
        return
    codec, group = _down(down, neurons)
    kept.neurons[name] = NeuronCodecs(gate, up, codec, group)
    if codec is not down:
        kept.requantized[f"{name}.down"] = stored[2]


def _down(codec: Codec | None, neurons: int) -> tuple[Codec, int]:
    """The codec of down and the neurons of a bundle, which are whole blocks of it if it is to be kept."""
    if codec is not None:
        block = KEPT[codec].weights
        for group in (block,) if block > SMALL_GROUP else (SMALL_GROUP, SMALL_GROUP // 2):
            if neurons % group == 0:
                return codec, group
    return DOWN, 1


def _blocks_problem(name: str, codec: Codec, k: int) -> str | None:
    if codec in KEPT and k % KEPT[codec].weights:
        return f"{name} has rows of {k} weights, which are not whole blocks of {codec.value}"
    return None


def _neurons_problem(name: str, codecs: NeuronCodecs, gated: bool, neurons: int, hidden: int) -> str | None:
    rows = [codecs.up] if codecs.gate is None else [codecs.gate, codecs.up]
    if (codecs.gate is not None) != gated:
        return f"{name} has codecs of neurons of another kind"
    if not set(rows) <= set(KEPT) or (codecs.down in KEPT) == (codecs.group == 1):
        return f"{name} has codecs that do not go together"
    if type(codecs.group) is not int or not 1 <= codecs.group <= neurons or neurons % codecs.group:
        return f"{name} has bundles of {codecs.group!r} neurons, of {neurons}"
    if codecs.group > 1 and (codecs.group % 64 or codecs.group > LARGEST_GROUP):
        return f"{name} has bundles of {codecs.group} neurons"
    problems = [_blocks_problem(name, codec, hidden) for codec in rows]
    if codecs.group > 1:
        problems.append(_blocks_problem(name, codecs.down, codecs.group))
    return next((problem for problem in problems if problem), None)
