from __future__ import annotations

import pytest
import torch

from .helpers import gpu, int32, pinned, shuffled


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("stride", [64, 192, 8192, 13888])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_come_whole_and_nothing_else_changes(device, stride, dtype):
    rows, out = pinned(noise(1, 23, stride), device), noise(2, 11, stride).to(device)
    indices, slots = shuffled(3, 23, 7).to(dtype), shuffled(4, 11, 7)
    expected = out.clone()
    expected[slots.to(device).long()] = rows[indices.long()].to(device)
    gpu.gather_rows(rows, indices.to(device), out, slots.to(device))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_only_counted_rows_come(device, count):
    rows, out = pinned(noise(1, 9, 128), device), noise(2, 6, 128).to(device)
    indices, slots = torch.full((6,), 1 << 40), torch.full((6,), 1 << 30, dtype=torch.int32)
    indices[:count], slots[:count] = torch.arange(count) + 3, torch.arange(count, dtype=torch.int32)
    expected = out.clone()
    expected[:count] = rows[3 : 3 + count].to(device)
    gpu.gather_rows(rows, indices.to(device), out, slots.to(device), int32(count).to(device))
    assert torch.equal(out, expected)


def test_wrong_arguments_are_named(device):
    rows, out = pinned(noise(1, 9, 128), device), noise(2, 6, 128).to(device)
    good = {"rows": rows, "indices": int32(1, 2).to(device), "out": out, "slots": int32(0, 3).to(device)}
    for name, wrong in [
        ("rows", rows[:, :64]),
        ("rows", pinned(noise(1, 9, 100), device)),
        ("rows", rows.to(torch.int16)),
        ("indices", int32(1, 2).float().to(device)),
        ("out", noise(2, 6, 192).to(device)),
        ("slots", int32(1).to(device)),
        ("count", int32(1, 1).to(device)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            gpu.gather_rows(**good | {name: wrong})


@pytest.mark.gpu
def test_host_memory_must_be_pinned(cuda):
    with pytest.raises(ValueError, match="pin_memory"):
        gpu.gather_rows(noise(1, 9, 128), int32(1).to(cuda), noise(2, 6, 128).to(cuda), int32(0).to(cuda))
    with pytest.raises(ValueError, match="^host: .*pin_memory"):
        gpu.LayerRows.create(noise(1, 9, 128), 4, cuda)


@pytest.mark.gpu
def test_real_sizes(cuda):
    stride = 13888
    rows, out = noise(1, 20000, stride).pin_memory(), torch.zeros((4000, stride), dtype=torch.uint8, device=cuda)
    indices, slots = shuffled(3, 20000, 4000), shuffled(4, 4000, 4000)
    gpu.gather_rows(rows, indices.to(cuda), out, slots.to(cuda))
    assert torch.equal(out[slots.to(cuda).long()].cpu(), rows[indices.long()])
