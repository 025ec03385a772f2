"""Under whose name the bytes of a pack stand in a plan, and how many they are."""

from __future__ import annotations

from flashrt.spec import ModelSpec
from flashrt.storage.layout import PREDICTOR, PackLayout, TensorLayout
from flashrt_kernels.rows import align

_LATENT = ("queries", "q_a", "q_b", "kv_a", "k_b", "v_b")
OWNERS = {  # by kind
    **dict.fromkeys(("qkv", "q", "k", "v", "gate", "beta", "decay", *_LATENT, "out"), "attention"),
    **dict.fromkeys(("project", "input_gate", "input_out"), "layer inputs"),
    "join": "attention",
    "router": "router",
    "shared_gate": "router",
    "shared": "shared experts",
    "channels": "FFN",
    "down": "FFN",
}
# Owners of weights, in order of claim.
WEIGHTS = ("router", "attention", "layer inputs", "head", "shared experts", "FFN", "experts", "embeddings")
VECTOR_STEP = 16  # float32 numbers in a cache line


def owner_of(spec: ModelSpec, tensor: TensorLayout) -> str:
    """Under whose name the bytes of a tensor stand in the plan."""
    if tensor.name == spec.head:
        return "head"
    if PREDICTOR in tensor.name:
        return "predictors"
    kind = tensor.name.rpartition(".")[2].partition(":")[0]
    if kind == "ffn":
        return "experts" if tensor.runs > 1 else "FFN"
    return OWNERS.get(kind, "embeddings")


def vector_bytes(layout: PackLayout) -> int:
    """Bytes of all vectors, each starting on a cache line."""
    return sum(4 * align(vector.length, VECTOR_STEP) for vector in layout.vectors.values())


def prefix_bytes(tensor: TensorLayout, blocks: int) -> int:
    """Bytes of the first `blocks` blocks of a tensor."""
    if blocks == 0:
        return 0
    last = tensor.block(blocks - 1)
    return last.offset + last.nbytes + last.tail - tensor.offset
