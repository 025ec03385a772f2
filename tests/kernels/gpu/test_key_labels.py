from __future__ import annotations

import pytest
import torch

from flashrt_kernels import reference
from flashrt_kernels.labels import label_shape

from .helpers import gpu, normal

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])


def made(device, heads, dim, channels, context, chosen=True):
    """Labels that are noise as yet. chosen: label values are numbers of the key, not sums."""
    random = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, label_shape(heads, context, channels), generator=random, dtype=torch.uint8)
    low = torch.rand((heads, channels), generator=random) * 2 - 3
    step = torch.rand((heads, channels), generator=random) * 0.4 + 0.1
    keys = normal(2, heads, channels, dim) / dim**0.5
    if chosen:
        numbers = torch.randint(0, dim, (heads, channels), generator=random)
        keys = torch.nn.functional.one_hot(numbers, dim).to(torch.float32)
    return gpu.KeyLabels(*(x.to(device) for x in (packed, keys, low, step)))


def appended(k, v, kv, slot, labels, position):
    """What the reference makes of it: cache, packed labels, and label values in units of their steps."""
    cache, packed = kv.clone(), labels.packed.clone()
    reference.kv_append(k, v, cache, slot)
    stored = cache[:, slot : slot + len(k), 0].to(torch.float32).transpose(0, 1)
    values = torch.einsum("hrd,nhd->nhr", labels.keys, stored)
    reference.label_append(values, labels.low, labels.step, packed, position)
    return cache, packed, (values - labels.low) / labels.step


def codes(packed):
    """packed [KVH, groups, r / 8, 16, 4] → codes [positions, KVH, r]."""
    both = torch.stack((packed & 15, packed >> 4), 4).permute(1, 3, 0, 2, 4, 5)
    return both.reshape(packed.shape[1] * 16, packed.shape[0], -1).to(torch.int32)


@HALF
@pytest.mark.parametrize(
    ("heads", "dim", "channels"), [(1, 64, 8), (2, 128, 32), (3, 20, 24), (5, 80, 40), (1, 1, 8), (1, 256, 256)]
)
@pytest.mark.parametrize(("slot", "position", "tokens"), [(0, 13, 5), (7, 37, 20), (49, 99, 1)])
def test_keys_values_and_codes(device, dtype, heads, dim, channels, slot, position, tokens):
    k, v = normal(3, tokens, heads, dim).to(device), normal(4, tokens, heads, dim).to(device)
    k[:, :, 0], v[:, :, 0] = 1 + 2**-8, 1 + 3 * 2**-8  # halves, for bfloat16
    v.view(torch.int32)[:, :, dim // 2] = 0x7FFFFFFF  # no number, and none when something is added
    kv, labels = normal(5, heads, 50, 2, dim).to(dtype).to(device), made(device, heads, dim, channels, 100)
    cache, packed, _ = appended(k, v, kv, slot, labels, position)
    gpu.kv_append(k, v, kv, slot, labels, position)
    assert torch.equal(kv.nan_to_num(77.0), cache.nan_to_num(77.0))
    assert torch.equal(labels.packed, packed)


@HALF
def test_codes_of_sums(device, dtype):
    """Sums of products may be rounded another way: that shows in values that lie between two codes."""
    heads, dim, channels = 3, 100, 24
    k, v = normal(3, 30, heads, dim).to(device), normal(4, 30, heads, dim).to(device)
    kv, labels = torch.zeros((heads, 40, 2, dim), dtype=dtype, device=device), made(device, 3, dim, channels, 50, False)
    _, packed, values = appended(k, v, kv, 2, labels, 11)
    gpu.kv_append(k, v, kv, 2, labels, 11)
    found, expected = codes(labels.packed), codes(packed)
    between = torch.zeros_like(expected, dtype=torch.bool)
    between[11:41] = ((values - values.floor()) - 0.5).abs() < 1e-4
    assert between.float().mean() < 1e-3
    assert torch.equal(found[~between], expected[~between])
    assert len(expected[11:41].unique()) == 16


def test_halves_go_to_even(device):
    """And what is not a number is zero."""
    values = torch.tensor([[[0.5, 1.5, 2.5, 14.5, 15.5, -0.5, 1e30, torch.nan]]], device=device)
    empty = torch.zeros(label_shape(1, 16, 8), dtype=torch.uint8, device=device)
    ones = torch.ones((1, 8), device=device)
    kv, labels = torch.zeros((1, 1, 2, 8), device=device), gpu.KeyLabels(empty, None, ones * 0, ones)
    for channel, expected in enumerate((0, 2, 2, 14, 15, 0, 15, 0)):  # one by one, as NaN times zero is NaN
        keys = torch.zeros((1, 8, 8), device=device)
        keys[:, :, channel] = 1
        key = torch.where(torch.arange(8, device=device) == channel, values, 0.0)
        gpu.kv_append(key, key, kv, 0, gpu.KeyLabels(labels.packed, keys, labels.low, labels.step), 3)
        assert codes(labels.packed)[3, 0].tolist() == [expected] * 8


def test_wrong_arguments_are_named(device):
    labels = made(device, 2, 16, 8, 64)
    kv, k = torch.zeros((2, 40, 2, 16), device=device), normal(3, 3, 2, 16).to(device)
    good = {"k": k, "v": k, "kv": kv, "slot": 37, "labels": labels, "position": 61}
    gpu.kv_append(**good)
    for name, wrong in [
        ("kv", kv.double()),
        ("kv", kv[:, ::2]),
        ("kv", torch.zeros((2, 40, 2, 513), device=device)),
        ("k", k[:, :1]),
        ("k", k.to(torch.bfloat16)),
        ("v", k[:2]),
        ("slot", 38),
        ("slot", -1),
        ("position", 62),
        ("position", -1),
    ]:
        with pytest.raises(ValueError, match=f"^{name}:"):
            gpu.kv_append(**good | {name: wrong})
    parts = {"labels": labels.packed, "keys": labels.keys, "low": labels.low, "step": labels.step}
    for name, wrong in [
        ("labels", labels.packed[:, ::2]),
        ("labels", made(device, 1, 16, 8, 64).packed),
        ("keys", labels.keys[:, :4]),
        ("low", labels.low[:1]),
        ("step", labels.step.double()),
    ]:
        with pytest.raises(ValueError, match=f"^{'step' if wrong.shape[0] == 1 and name == 'labels' else name}:"):
            gpu.kv_append(**good | {"labels": gpu.KeyLabels(*(parts | {name: wrong}).values())})
