"""Random bundles and error measures, in torch: a machine with a GPU may lack the extension for the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashrt_kernels import reference
from flashrt_kernels.rows import Codec, bundle_stride, row_bytes

gpu = pytest.importorskip("flashrt_kernels.gpu", reason="triton is not installed")


class AskNothing(TorchDispatchMode):
    """Fails when a tensor's value is asked for, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


def pinned(tensor: Tensor, device: str) -> Tensor:
    """Host memory that kernels on `device` can read."""
    return tensor.pin_memory() if device == "cuda" else tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float32; every eleventh is ten times larger, as activations have outliers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::11] *= 10
    return x


def neurons(seed: int, n: int, k: int, codec: Codec, gated: bool = True, device: str = "cpu") -> Tensor:
    """Bundles of n random neurons, made on `device`; their padding is not zero, as no kernel may read it."""
    rows = 3 if gated else 2
    encoded = torch.empty((n * rows, row_bytes(codec, k)), dtype=torch.uint8, device=device)
    reference.quantize(normal(seed, n * rows, k).to(device) / k**0.5, codec, encoded)
    result = torch.full((n, bundle_stride(codec, k, rows)), 0xFF, dtype=torch.uint8, device=device)
    result[:, : rows * encoded.shape[1]] = encoded.view(n, -1)
    return result


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def listed(rows: gpu.RowList) -> list[int]:
    return rows.items[: int(rows.count)].tolist()


def row_list(rows: Sequence[int], device: str, room: int) -> gpu.RowList:
    """A list with room for more; what follows its rows would lead astray."""
    result = gpu.RowList.empty(room, device)
    result.items.fill_(1 << 30)
    result.items[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    result.count.fill_(len(rows))
    return result


def shuffled(seed: int, n: int, count: int) -> Tensor:
    """`count` different numbers below n, int32."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].to(torch.int32)


def rms_ratio(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the expected numbers. NaN compares as a failure."""
    expected = expected.cpu().double()
    return float((found.cpu().double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, with no NaN that would hide an unwritten number."""
    return bool(a.isfinite().all()) and torch.equal(a.view(torch.int32), b.view(torch.int32))
