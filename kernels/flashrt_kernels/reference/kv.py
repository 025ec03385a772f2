"""Keys and values as caches hold them (`flashrt_kernels.kv`): written, and as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from flashrt_kernels.kv import CHUNK, KvCodec
from flashrt_kernels.reference.formats import decode_kept
from flashrt_kernels.rows import KEPT, Codec, align, row_bytes


def kv_append(k: Tensor, v: Tensor | None, kv: Tensor, start: int) -> None:
    """Writes k and v [B, KVH, D] at positions start.. of kv [KVH, context, *pair]. Raises ValueError beyond its end.

    v is None where kv holds keys only.
    """
    if not 0 <= start <= kv.shape[1] - k.shape[0]:
        raise ValueError(f"start: {start} and {k.shape[0]} tokens do not fit in a context of {kv.shape[1]}")
    blocks = _blocks(kv, k.shape[2])
    rows = [k] if v is None else [k, v]
    if blocks is None:
        pairs = torch.stack(rows, 2).to(kv.dtype)
    else:
        pairs = torch.cat([_encoded(x, codec) for x, codec in zip(rows, blocks, strict=True)], 2)[:, :, None]
    kv[:, start : start + k.shape[0]] = pairs.transpose(0, 1)


def keys_and_values(kv: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Those of kv [.., *pair], float32 [.., dim] each; of keys only, these twice."""
    blocks = _blocks(kv, dim)
    if blocks is None:
        found = kv.to(torch.float32).unbind(-2)
        return found[0], found[-1]
    width = align(dim, CHUNK)
    rows = kv.flatten(0, -2).split([row_bytes(codec, width) for codec in blocks], 1)
    found = tuple(
        decode_kept(own, codec, width).reshape(*kv.shape[:-2], width)[..., :dim]
        for own, codec in zip(rows, blocks, strict=True)
    )
    return found[0], found[-1]


def _blocks(kv: Tensor, dim: int) -> tuple[Codec, ...] | None:
    """What keys and values are rows of, keys alone where there are no others; None: of numbers."""
    if kv.dtype != torch.uint8:
        return None
    for codec in KvCodec:
        for keys_only in (False, True):
            if codec.blocks is not None and tuple(kv.shape[-2:]) == codec.pair(dim, keys_only):
                return codec.blocks[: 1 if keys_only else 2]
    raise ValueError(f"kv: {kv.shape[-1]} bytes hold no keys and values of heads of {dim}")


def _encoded(x: Tensor, codec: Codec) -> Tensor:
    """[B, KVH, D] → uint8 [B, KVH, bytes], rounded as ggml rounds."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[2] % CHUNK))
    blocks = padded.reshape(-1, KEPT[codec].weights)
    return (_q8_0 if codec is Codec.Q8_0 else _q4_0)(blocks).reshape(*x.shape[:2], -1)


def _q8_0(blocks: Tensor) -> Tensor:
    scale = _finite(blocks, blocks.abs().amax(1, keepdim=True) / 127)
    steps = (blocks * _inverse(scale)).abs().nan_to_num(0.0)
    codes = steps.floor() + (steps - steps.floor() >= 0.5)
    return torch.cat((_half(scale), codes.copysign(blocks).to(torch.int8).view(torch.uint8)), 1)


def _q4_0(blocks: Tensor) -> Tensor:
    scale = _finite(blocks, blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8)
    codes = (blocks * _inverse(scale) + 8.5).nan_to_num(0.0).to(torch.uint8).clamp(max=15)
    return torch.cat((_half(scale), codes[:, :16] | codes[:, 16:] << 4), 1)


def _finite(blocks: Tensor, scale: Tensor) -> Tensor:
    """The scale of each block; not a number where not all of the block are finite."""
    return torch.where(blocks.isfinite().all(1, keepdim=True), scale, torch.nan)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _half(scale: Tensor) -> Tensor:
    return scale.to(torch.float16).view(torch.uint8)
