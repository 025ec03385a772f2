"""What differs between computing on the CPU and on a GPU: what the process costs, and the device it computes on."""

from __future__ import annotations

import functools
import subprocess
from typing import Any, Protocol

from flashrt.budget.ledger import Ledger
from flashrt.budget.plan import FixedCosts, Plan
from flashrt.budget.planner import GIB, host_tier
from flashrt.cache.device import CpuDevice, Device
from flashrt.config import budget_bytes
from flashrt.errors import BudgetError, DeviceError
from flashrt.kv.base import KvLimits
from flashrt.kv.cache import KINDS, RESIDENT_KINDS, Choices, KvKinds, kv_scratch_bytes
from flashrt.machine.process import (
    available_bytes,
    peak_resident_bytes,
    release_free_memory,
    resident_bytes,
    usable_cores,
)
from flashrt.model.workspace import reserve, scratch_bytes
from flashrt.spec import DeltaNet, ModelSpec
from flashrt.storage.layout import PackLayout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import Codec

RUNTIME_GROWTH = 4 << 20  # what the interpreter still takes after it was measured: reports, text, block lists
HOST_SHARE = 0.5  # of the memory available that pinned host memory takes when no host budget is given
TORCH_QUERIES = 64  # queries whose attention scores torch's operations hold at a time


class Runtime(Protocol):
    """A device before any model is on it. Measure it when everything but the model is loaded."""

    ops: Ops[Any]
    bounds_process: bool  # whether the budget is for the process itself
    kv_kinds: KvKinds  # stores that keys and values may be kept in

    def fixed_costs(self, pack: Pack) -> FixedCosts:
        """What the process costs on the budgeted device."""

    def scratch_bytes(self, pack: Pack, tokens: int, context: int) -> int:
        """Bytes that kernels need for intermediate results in a pass of `tokens` tokens at the end of `context`."""

    def kv_scratch_bytes(self, pack: Pack, limits: KvLimits, choices: Choices) -> int:
        """Bytes of these that stores of keys and values need at least."""

    def available(self) -> int:
        """Bytes that a budget may cover when the user gives none."""

    def device(self, pack: Pack, plan: Plan, ledger: Ledger, reader: Reader) -> Device:
        """The device that carries out `plan`."""

    def peak_bytes(self) -> int | None:
        """The most memory that the process has held on a GPU; None where the budget bounds the process itself."""


class CpuRuntime:
    """The budget bounds the whole process."""

    bounds_process = True

    def __init__(self, threads: int | None, kv_kinds: KvKinds = KINDS) -> None:
        self.kv_kinds = kv_kinds
        self.ops = load_kernels("cpu")
        self.ops.set_threads(usable_cores() if threads is None else threads)

    def fixed_costs(self, pack: Pack) -> FixedCosts:
        reserve(pack.spec, pack.layout, self.ops)
        release_free_memory()
        return FixedCosts(
            resident_bytes() + RUNTIME_GROWTH,
            peak_resident_bytes(),
            kv_codec(pack),
            functools.partial(self.scratch_bytes, pack),
            kv_kinds=self.kv_kinds,
            kv_scratch_bytes=functools.partial(self.kv_scratch_bytes, pack),
        )

    def scratch_bytes(self, pack: Pack, tokens: int, context: int) -> int:
        return scratch_bytes(pack.spec, pack.layout, self.ops, tokens)

    def kv_scratch_bytes(self, pack: Pack, limits: KvLimits, choices: Choices) -> int:
        return kv_scratch_bytes(pack.spec, limits, self.ops, self.kv_kinds, choices)

    def available(self) -> int:
        return resident_bytes() + available_bytes()

    def device(self, pack: Pack, plan: Plan, ledger: Ledger, reader: Reader) -> Device:
        return CpuDevice(self.ops, ledger, reader)

    def peak_bytes(self) -> int | None:
        return None


class CudaRuntime:
    """The budget bounds all GPU memory of the process, its context included; `host_budget_gb` bounds host memory."""

    bounds_process = False
    kv_kinds = RESIDENT_KINDS

    def __init__(self, host_budget_gb: float | None) -> None:
        before = _gpu_used_bytes()
        try:
            import torch
        except ImportError:
            raise DeviceError("--device cuda needs torch: install flashrt[gpu]") from None
        if not torch.cuda.is_available():
            raise DeviceError("--device cuda: torch sees no CUDA device. Use --device cpu")
        self.ops = load_kernels("torch")
        self._torch = torch
        self._host_bytes = None if host_budget_gb is None else budget_bytes(host_budget_gb)
        self._warm_up()
        free, total = torch.cuda.mem_get_info()
        self._context = total - free - before - torch.cuda.memory_reserved()

    def fixed_costs(self, pack: Pack) -> FixedCosts:
        if pack.manifest.sparsity is not None:
            raise DeviceError("sparse mode computes on the CPU only: use --device cpu, or --mode exact")
        runtime = self._context + RUNTIME_GROWTH
        scratch = functools.partial(self.scratch_bytes, pack)
        return FixedCosts(runtime, runtime, kv_codec(pack), scratch, supports_gather=False, kv_kinds=self.kv_kinds)

    def scratch_bytes(self, pack: Pack, tokens: int, context: int) -> int:
        return torch_scratch_bytes(pack, tokens, context)

    def kv_scratch_bytes(self, pack: Pack, limits: KvLimits, choices: Choices) -> int:
        return 0

    def available(self) -> int:
        return int(self._torch.cuda.mem_get_info()[0]) + self._context

    def device(self, pack: Pack, plan: Plan, ledger: Ledger, reader: Reader) -> Device:
        from flashrt.cache.torch_device import TorchDevice, arena_bytes

        torch = self._torch
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min((plan.budget_bytes - self._context) / total, 1.0))
        blocks = host_tier(pack.spec, pack.layout, plan, self._host_tier_bytes(pack.spec, pack.layout, plan))
        arena = arena_bytes(plan, self.scratch_bytes(pack, plan.prefill_chunk, plan.context))
        return TorchDevice(self.ops, "cuda", ledger, reader, arena, blocks)

    def peak_bytes(self) -> int | None:
        return self._context + int(self._torch.cuda.max_memory_reserved())

    def _host_tier_bytes(self, spec: ModelSpec, layout: PackLayout, plan: Plan) -> int:
        """What pinned host memory may take for weights: the host's budget less the process and the staging buffers."""
        from flashrt.cache.torch_device import FILL_DEPTH

        buffers = FILL_DEPTH if plan.reads_in_place else 2  # read into place through those of loading
        staging = 2 * plan.ring_slots * plan.slot_bytes + buffers * max(
            t.max_block_bytes for t in layout.tensors.values()
        )
        if self._host_bytes is None:
            return max(int(HOST_SHARE * available_bytes()) - staging, 0)
        needed = resident_bytes() + RUNTIME_GROWTH + staging
        if self._host_bytes < needed:
            raise BudgetError(
                f"a host budget of {self._host_bytes / GIB:.3f} GiB is too small: the process and its staging buffers "
                f"take {needed / GIB:.3f} GiB"
            )
        return self._host_bytes - needed

    def _warm_up(self) -> None:
        """Make the libraries take what they take, so that it can be measured."""
        torch = self._torch
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.ones(64, 64, device="cuda", dtype=dtype)
            (square @ square).sum().item()
        torch.cuda.empty_cache()


def runtime_for(device: str, threads: int | None = None, host_budget_gb: float | None = None) -> Runtime:
    """The runtime named by `--device`, for checked options. Raises DeviceError when it is not there."""
    return CpuRuntime(threads) if device == "cpu" else CudaRuntime(host_budget_gb)


def load_kernels(backend: str) -> Ops[Any]:
    """A backend of the kernels. Raises DeviceError with the reason when there is none."""
    try:
        return ops.load(backend)
    except ops.BackendUnavailable as error:
        raise DeviceError(str(error)) from None


def kv_codec(pack: Pack) -> KvCodec:
    """How keys and values of a pack are held where nothing else is asked for."""
    return KvCodec.F32 if pack.manifest.dtype is Codec.F32 else KvCodec.BF16


def torch_scratch_bytes(pack: Pack, tokens: int, context: int) -> int:
    """A bound on what torch's operations hold at once beside their results.

    The largest of: a block decoded to float32 with its intermediate forms, next to its product; attention over the
    whole context, with keys and values in float32 and the scores of a slice of queries; and a delta net's rows and
    states.
    """
    decoded = max(t.max_block_bytes // t.stride * t.bundle_rows * t.columns for t in pack.layout.tensors.values())
    widest = max(t.max_block_bytes // t.stride * t.bundle_rows for t in pack.layout.tensors.values())
    mixing = 0
    for layer in set(pack.spec.layers):
        a = layer.mixer
        if isinstance(a, DeltaNet):
            states = NARROW_TOKENS + 4  # one for each node of a tree
            mixing = max(mixing, (states * a.state_size + 3 * tokens * a.row_width) * 4)
            continue
        scores = min(tokens, TORCH_QUERIES) * a.heads
        mixing = max(mixing, context * (4 * a.kv_heads * a.head_dim + 3 * scores) * 4)
    return max((6 * decoded + 3 * tokens * widest) * 4, mixing)


def _gpu_used_bytes() -> int:
    """Memory in use on the first GPU before this process touches it; 0 when the driver's tool is missing."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(output.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0
