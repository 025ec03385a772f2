"""Compiles every kernel, as the wrappers launch it, for a GPU that need not be there. Run by `test_compile.py`.

python compile_for.py CAPABILITY CODEC          (capability as in 90; prints the kernels)
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.gpu import KeyLabels, LayerRows, SparseStep, attention_list, glu_rows, kv_append, select_blocks
from flashrt_kernels.labels import label_shape
from flashrt_kernels.rows import Codec, bundle_stride


class Absent:
    """What the compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    codec, compiled = Codec(sys.argv[2]), set()
    shared = 64 << 10 if int(sys.argv[1]) < 80 else 99 << 10  # that a program can have on the smallest GPU of the kind
    launch = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= shared, (self.__name__, kernel.metadata.shared)
        compiled.add(self.__name__)
        return kernel

    triton.runtime.driver.set_active(Absent(int(sys.argv[1])))
    JITFunction.run = compile_only
    for k, activation, gated in ((1536, "silu", True), (40, "gelu", False)):
        bias = None if gated else torch.ones(512)
        host = torch.zeros((512, bundle_stride(codec, k, 3 if gated else 2)), dtype=torch.uint8)
        step = SparseStep(512, 256, k, codec, activation, gated, "cpu")
        x, scores = torch.ones(2, k), torch.ones(2, 512)
        step(LayerRows.create(host, 256, "cpu", bias), x, scores, 0.5, torch.zeros(2, k))
    x, slots = torch.ones(1, k), torch.arange(33, dtype=torch.int32)
    for activation in ("gelu_tanh", "relu", "relu2", "fatrelu:0.5"):
        glu_rows(x, FfnWeights(host, codec, activation, False), x.clone(), slots, factors=torch.ones(1))
    attend(heads=12, kv_heads=2, dim=128, channels=32, dtype=torch.bfloat16)
    attend(heads=5, kv_heads=5, dim=80, channels=24, dtype=torch.float32)
    attend(heads=32, kv_heads=1, dim=256, channels=64, dtype=torch.float32)
    attend(heads=16, kv_heads=1, dim=512, channels=128, dtype=torch.float32)
    print(*sorted(compiled))


def attend(heads: int, kv_heads: int, dim: int, channels: int, dtype: torch.dtype) -> None:
    """A decode step of two rows, each kernel once."""
    k, q, step = torch.ones(2, kv_heads, dim), torch.ones(2, heads, dim), torch.ones(kv_heads, channels)
    near, keys = torch.zeros(kv_heads, 100, 2, dim, dtype=dtype), torch.ones(kv_heads, channels, dim)
    labels = torch.zeros(label_shape(kv_heads, 100, channels), dtype=torch.uint8)
    ends, counts = torch.ones(2, dtype=torch.int32), torch.ones(2, kv_heads, dtype=torch.int32)
    lists, out = torch.zeros(2, kv_heads, 7, dtype=torch.int32), torch.zeros(2, heads * dim)
    kv_append(k, k, near, 3, KeyLabels(labels, keys, step, step), 5)
    select_blocks(q[:, :, :channels].contiguous(), labels, step, 0.5, 1, ends, counts, 8, lists, counts)
    for far, softcap in ((None, 20.0), (near[0], None)):
        attention_list(q, near, far, lists, counts, 0.5, softcap, out)


if __name__ == "__main__":
    main()
