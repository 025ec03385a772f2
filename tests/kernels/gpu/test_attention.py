from __future__ import annotations

import pytest
import torch

from flashrt_kernels import reference

from .helpers import gpu, normal, pinned, rms_ratio, same

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def packed(lists, device, room=3):
    """lists [T][KVH] → lists and counts; what follows a list would lead astray."""
    most = max(len(each) for row in lists for each in row) + room
    items = torch.full((len(lists), len(lists[0]), most), 1 << 30, dtype=torch.int32)
    counts = torch.tensor([[len(each) for each in row] for row in lists], dtype=torch.int32)
    for t, row in enumerate(lists):
        for h, each in enumerate(row):
            items[t, h, : len(each)] = torch.as_tensor(each, dtype=torch.int32)
    return items.to(device), counts.to(device)


def attended(q, near, far, lists, scale=0.2, softcap=None, room=3, sinks=None):
    out = torch.full((len(q), q.shape[1] * q.shape[2]), torch.nan, device=q.device)
    gpu.attention_list(q, near, far, *packed(lists, q.device, room), scale, softcap, out, sinks)
    return out


def numbers(seed, low, high, count):
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@HALF
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "softcap"),
    [
        (12, 2, 128, None),
        (9, 3, 20, None),
        (5, 1, 80, 20.0),
        (4, 4, 256, None),
        (3, 1, 512, None),
        (22, 1, 10, 5.0),
        (3, 3, 1, None),
    ],
)
def test_it_matches_the_reference(device, dtype, heads, kv_heads, dim, softcap):
    near, far = normal(1, kv_heads, 300, 2, dim).to(dtype), normal(2, 150, 2, dim).to(dtype)
    sizes = (1, 256, 0, 257, 600)
    lists = [[numbers(10 * t + h, -150, 300, n) for h in range(kv_heads)] for t, n in enumerate(sizes)]
    lists[0][0] = []
    q, scale = normal(3, len(sizes), heads, dim), dim**-0.5
    expected = torch.full((len(sizes), heads * dim), torch.nan)
    reference.attention_list(q, near, far, *packed(lists, "cpu"), scale, softcap, expected)
    out = attended(q.to(device), near.to(device), pinned(far, device), lists, scale, softcap)
    assert rms_ratio(out, expected) < (1e-3 if device == "cuda" else 5e-6)
    assert not out[2].any()
    assert not out[0, : heads // kv_heads * dim].any()
    sinks = normal(6, heads) * 4 + 12
    reference.attention_list(q, near, far, *packed(lists, "cpu"), scale, softcap, expected, None, sinks)
    beside = sinks.to(device)
    out = attended(q.to(device), near.to(device), pinned(far, device), lists, scale, softcap, sinks=beside)
    assert rms_ratio(out, expected) < (1e-3 if device == "cuda" else 5e-6)
    assert not out[2].any()


def test_many_segments(device):
    """More than are merged at a time, with the highest scores in the last one."""
    near, q = normal(1, 1, 600, 2, 12), normal(3, 1, 2, 12)
    lists, expected = [[[*numbers(4, 0, 500, 4200), *range(500, 600)]]], torch.empty(1, 24)
    near[0, 500:, 0] *= 3
    reference.attention_list(q, near, None, *packed(lists, "cpu"), 0.2, None, expected)
    assert rms_ratio(attended(q.to(device), near.to(device), None, lists), expected) < 1e-3


@HALF
def test_where_tokens_lie_does_not_matter(device, dtype):
    """The same tokens in near memory, in another order there, or in far memory; and near memory on the host."""
    near, q = normal(1, 2, 400, 2, 40).to(dtype), normal(3, 1, 6, 40).to(device)
    dense = attended(q, near.to(device), None, [[range(400)] * 2])
    order = torch.randperm(400, generator=torch.Generator().manual_seed(4))
    where = order.argsort()
    away = torch.rand((2, 400), generator=torch.Generator().manual_seed(5)) < 0.5
    lists = [[torch.where(away[h], -1 - (400 * h + torch.arange(400)), where) for h in range(2)]]
    far, mixed = near.reshape(800, 2, 40), near[:, order].contiguous()
    assert same(attended(q, mixed.to(device), pinned(far, device), lists), dense)
    assert same(attended(q, pinned(mixed, device), far.to(device), lists), dense)


def test_other_rows_and_longer_lists_do_not_matter(device):
    near, q = normal(1, 1, 500, 2, 24).to(torch.bfloat16).to(device), normal(3, 4, 3, 24).to(device)
    lists = [[numbers(t, 0, 500, n)] for t, n in enumerate((1100, 17, 513, 256))]
    whole = attended(q, near, None, lists)
    for t in range(4):
        assert same(attended(q[t : t + 1], near, None, lists[t : t + 1], room=700), whole[t : t + 1])


def test_others_are_not_read(device):
    near, q, lists = normal(1, 2, 64, 2, 16), normal(3, 2, 4, 16).to(device), [[[3, 9], [4]], [[5], [60, 3]]]
    expected = attended(q, near.to(device), None, lists)
    poisoned = torch.full_like(near, torch.nan)
    poisoned[0, [3, 9, 5]], poisoned[1, [4, 60, 3]] = near[0, [3, 9, 5]], near[1, [4, 60, 3]]
    assert same(attended(q, poisoned.to(device), None, lists), expected)


def test_wrong_arguments_are_named(device):
    near, far = normal(1, 2, 32, 2, 16).to(device), normal(2, 5, 2, 16).to(device)
    lists, counts = packed([[[0, 31], [-5, 3, 4]]] * 3, device)
    good = {
        "q": normal(3, 3, 4, 16).to(device),
        "near": near,
        "far": far,
        "lists": lists,
        "counts": counts,
        "scale": 1.0,
        "softcap": None,
        "out": torch.empty((3, 64), device=device),
    }
    gpu.attention_list(**good)
    for name, wrong in [
        ("q", normal(3, 3, 8, 16).to(device)[:, ::2]),
        ("q", normal(3, 3, 4, 577).to(device)),
        ("near", near.double()),
        ("near", near[:, :, :, :8]),
        ("near", near[:, ::2]),
        ("near", normal(1, 3, 32, 2, 16).to(device)),
        ("far", far[::2]),
        ("far", far.to(torch.bfloat16)),
        ("lists", lists[:2]),
        ("lists", lists.long()),
        ("counts", counts[:, :1]),
        ("out", good["out"][:, :63]),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            gpu.attention_list(**good | {name: wrong})


@pytest.mark.gpu
def test_host_memory_must_be_pinned(cuda):
    near, q = normal(1, 1, 32, 2, 16), normal(3, 1, 2, 16).to(cuda)
    with pytest.raises(ValueError, match=r"^near: .*pin_memory"):
        attended(q, near, None, [[[0]]])
    with pytest.raises(ValueError, match=r"^far: .*pin_memory"):
        attended(q, near.to(cuda), near[0], [[[0]]])


@pytest.mark.gpu
def test_real_sizes(cuda):
    near, far = (normal(seed, 8, 20000, 2, 128).to(torch.bfloat16) for seed in (1, 2))
    lists = [[numbers(8 * t + h, -160000, 20000, 3000) for h in range(8)] for t in range(4)]
    q, expected = normal(3, 4, 32, 128), torch.empty(4, 4096)
    reference.attention_list(q, near, far.view(-1, 2, 128), *packed(lists, "cpu"), 0.08, None, expected)
    out = attended(q.to(cuda), near.to(cuda), far.view(-1, 2, 128).pin_memory(), lists, 0.08)
    assert rms_ratio(out, expected) < 1e-3
