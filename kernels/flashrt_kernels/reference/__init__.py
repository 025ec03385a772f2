"""The kernels in plain torch, on any device: the oracle of the `cpu` backend, and the operations of a CUDA device.

Signatures are those of `flashrt_kernels.cpu`, on tensors; a cache of bfloat16 is a tensor of that type. Wide variants
are the same maths; on a CUDA device they multiply in bfloat16, except for F32 rows.
"""

from __future__ import annotations

import torch

from flashrt_kernels.reference.attention import (
    attend_page,
    attention,
    attention_scratch_bytes,
    attention_state_width,
)
from flashrt_kernels.reference.channels import down, gate_up, gate_up_scratch_bytes, gemm_down, gemm_gate_up
from flashrt_kernels.reference.elementwise import activate, layer_norm, rms_norm, rope, softcap
from flashrt_kernels.reference.glu import gemm_glu, glu
from flashrt_kernels.reference.kv import kv_append
from flashrt_kernels.reference.linear import (
    gemm_linear,
    gemm_linear_add,
    gemm_scratch_bytes,
    linear,
    linear_add,
    linear_by_head,
)
from flashrt_kernels.reference.quantize import dequantize, quantize
from flashrt_kernels.reference.recurrent import (
    delta_rule,
    delta_rule_scratch_bytes,
    rms_norm_gated,
    sigmoid_gate,
)
from flashrt_kernels.reference.sparse import (
    attention_list,
    attention_list_scratch_bytes,
    label_append,
    select,
    select_scratch_bytes,
)

__all__ = [
    "activate",
    "attend_page",
    "attention",
    "attention_list",
    "attention_list_scratch_bytes",
    "attention_scratch_bytes",
    "attention_state_width",
    "delta_rule",
    "delta_rule_scratch_bytes",
    "dequantize",
    "down",
    "gate_up",
    "gate_up_scratch_bytes",
    "gemm_down",
    "gemm_gate_up",
    "gemm_glu",
    "gemm_linear",
    "gemm_linear_add",
    "gemm_scratch_bytes",
    "glu",
    "isa",
    "kv_append",
    "label_append",
    "layer_norm",
    "linear",
    "linear_add",
    "linear_by_head",
    "quantize",
    "reserve",
    "reserve_groups",
    "rms_norm",
    "rms_norm_gated",
    "rope",
    "select",
    "select_scratch_bytes",
    "set_threads",
    "sigmoid_gate",
    "softcap",
    "threads",
]


def reserve(k: int) -> int:
    """Torch allocates for itself."""
    return 0


def reserve_groups() -> int:
    """Torch allocates for itself."""
    return 0


def set_threads(n: int) -> None:
    """Threads of torch's operations on the host."""
    torch.set_num_threads(n)


def threads() -> int:
    """Threads of torch's operations on the host."""
    return torch.get_num_threads()


def isa() -> str:
    """What computes."""
    return "torch"
