"""What the wrappers check before a kernel is launched."""

from __future__ import annotations

import torch
from torch import Tensor


def check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device) -> None:
    """Raise ValueError unless `tensor` has this type and shape (None: any size), no gaps, and lies on `device`."""
    expected = f"{str(dtype).removeprefix('torch.')} {_show(shape)} on {device}"
    found = f"{str(tensor.dtype).removeprefix('torch.')} {_show(tuple(tensor.shape))} on {tensor.device}"
    fits = tensor.ndim == len(shape) and all(
        want in (None, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{name}: expected {expected}, found {found}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {tensor.stride()}")


def check_readable(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless kernels on `device` can read `tensor`: there, or in pinned host memory over the bus."""
    if tensor.device != device and not tensor.is_pinned():
        raise ValueError(f"{name}: expected pinned host memory or {device}, found pageable memory; use pin_memory()")


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
