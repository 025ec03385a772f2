from __future__ import annotations

import pytest
import torch

from flashrt_kernels import reference
from flashrt_kernels.labels import label_shape

from .helpers import AskNothing, gpu, normal


def made(seed, kv_heads, context, channels):
    """Random labels, and a step for each channel."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 256, label_shape(kv_heads, context, channels), generator=random, dtype=torch.uint8)
    return labels, torch.rand((kv_heads, channels), generator=random) * 0.4 + 0.1


def choice(device, q, labels, step, first, ends, keep, block, select=gpu.select_blocks, scale=0.3, room=None):
    """What is chosen, as lists [T][KVH]; nothing is written behind."""
    ends, keep = torch.tensor(ends, dtype=torch.int32), torch.as_tensor(keep).to(torch.int32)
    most = room or max(1, min(int(keep.max()), int(ends.max()) - first))
    chosen, counts = torch.full((*keep.shape, most), -7), torch.full(keep.shape, -7)
    q, labels, step, ends, keep = (x.to(device) for x in (q, labels, step, ends, keep))
    chosen, counts = (x.to(torch.int32).to(device) for x in (chosen, counts))
    select(q, labels, step, scale, first, ends, keep, block, chosen, counts)
    found = [
        [(row[:count].tolist(), row[count:]) for row, count in zip(rows, of, strict=True)]
        for rows, of in zip(chosen, counts.tolist(), strict=True)
    ]
    assert all((behind == -7).all() for row in found for _, behind in row)
    return [[items for items, _ in row] for row in found]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "block"),
    [(12, 2, 32, 8), (1, 1, 8, 1), (9, 3, 24, 2), (4, 1, 40, 4), (22, 1, 16, 16), (3, 3, 136, 8)],
)
@pytest.mark.parametrize(("context", "first", "ends"), [(64, 0, [32, 64, 17]), (1400, 264, [1312, 1024, 320, 272, 16])])
def test_it_chooses_what_the_reference_does(device, heads, kv_heads, channels, block, context, first, ends):
    labels, step = made(1, kv_heads, context, channels)
    ends, first = [end // block for end in ends], first // block
    q = normal(2, len(ends), heads, channels) / channels**0.5
    random = torch.Generator().manual_seed(3)
    share = torch.rand((len(ends), kv_heads), generator=random) * 0.6
    keep = (share * (torch.tensor(ends) - first)[:, None]).ceil().clamp(min=0)
    keep[1] = 10000  # more than there are
    room = max(1, max(ends) - first)
    expected = choice("cpu", q, labels, step, first, ends, keep, block, reference.select, room=room)
    assert choice(device, q, labels, step, first, ends, keep, block, room=room) == expected
    assert any(0 < len(items) < end - first for row, end in zip(expected, ends, strict=True) for items in row)


def test_many_chunks(device):
    """More than are brought together at a time, with the highest scores in the last ones."""
    labels, step = made(1, 1, 18000, 8)
    labels[:, :1100] &= 0x33
    q = normal(2, 1, 3, 8).abs()
    expected = choice("cpu", q, labels, step, 1, [2240], [[150]], 8, reference.select)
    assert choice(device, q, labels, step, 1, [2240], [[150]], 8) == expected
    assert len({block // 2048 for block in expected[0][0]}) == 2


def test_of_equals_the_earlier_go_first(device):
    """A query of zeros cannot tell tokens apart; blocks with the same labels weigh the same."""
    labels, step = made(1, 1, 2600, 8)
    zeros = torch.zeros((1, 2, 8))
    assert choice(device, zeros, labels, step, 2, [320], [[1100]], 8, room=1100) == [[list(range(2, 320))]]
    assert choice(device, zeros, labels, step, 2, [2500], [[1500]], 1) == [[list(range(2, 1502))]]
    twins = labels[:, :2].repeat(1, 80, 1, 1, 1)  # four blocks, over and over
    q = normal(2, 1, 2, 8)
    expected = choice("cpu", q, twins, step, 1, [300], [[100]], 8, reference.select)
    assert choice(device, q, twins, step, 1, [300], [[100]], 8) == expected
    assert len({block % 4 for block in expected[0][0]}) > 1


def test_sharp_scores(device):
    """Weights that differ by more than a float has room for: the zeros that are left are equals."""
    labels, step = made(1, 2, 1600, 32)
    q = normal(2, 1, 4, 32) * 10
    few, many = choice(device, q, labels, step, 1, [200], [[1, 150]], 8, scale=1.0)[0]
    expected = choice("cpu", q, labels, step, 1, [200], [[1, 3]], 8, reference.select, scale=1.0)[0]
    assert few == expected[0]
    assert len(many) == 150
    assert set(expected[1][:1]) <= set(many)


def test_other_rows_and_longer_labels_do_not_matter(device):
    labels, step = made(1, 2, 2400, 24)
    q, ends = normal(2, 4, 6, 24) / 5, [290, 300, 17, 1]
    keep = torch.randint(0, 80, (4, 2), generator=torch.Generator().manual_seed(3))
    whole = choice(device, q, labels, step, 1, ends, keep, 8, room=90)
    for t, end in enumerate(ends):
        short = labels[:, : max(1, -(-end // 2))].contiguous()
        alone = choice(device, q[t : t + 1], short, step, 1, [end], keep[t : t + 1], 8, room=80)
        assert alone == whole[t : t + 1]


def test_labels_of_others_are_not_looked_at(device):
    labels, step = made(1, 1, 512, 16)
    q = normal(2, 1, 3, 16) / 4
    found = choice(device, q, labels, step, 4, [38], [[9]], 8)
    labels[:, :2], labels[:, 19:] = 255 - labels[:, :2], 255 - labels[:, 19:]
    assert choice(device, q, labels, step, 4, [38], [[9]], 8) == found


def test_it_asks_the_device_nothing(device):
    labels, step = (x.to(device) for x in made(1, 1, 64, 8))
    ends, keep, counts = (torch.ones(shape, dtype=torch.int32, device=device) for shape in ((1,), (1, 1), (1, 1)))
    chosen = torch.full((1, 1, 2), -1, dtype=torch.int32, device=device)
    with AskNothing():
        gpu.select_blocks(normal(2, 1, 2, 8).to(device), labels, step, 1.0, 0, ends, keep, 8, chosen, counts)
    assert chosen.tolist() == [[[0, -1]]]


def test_wrong_arguments_are_named(device):
    labels, step = (x.to(device) for x in made(1, 2, 160, 16))
    ends, keep = torch.tensor([20, 10, 0], dtype=torch.int32), torch.full((3, 2), 4, dtype=torch.int32)
    good = {
        "q": normal(1, 3, 6, 16).to(device),
        "labels": labels,
        "step": step,
        "scale": 0.5,
        "first": 1,
        "ends": ends.to(device),
        "keep": keep.to(device),
        "block": 8,
        "chosen": torch.zeros((3, 2, 9), dtype=torch.int32, device=device),
        "counts": torch.zeros((3, 2), dtype=torch.int32, device=device),
    }
    gpu.select_blocks(**good)
    assert good["counts"].tolist() == [[4, 4], [4, 4], [0, 0]]
    for name, wrong in [
        ("q", normal(1, 3, 6, 24).to(device)),
        ("q", normal(1, 3, 5, 16).to(device)),
        ("labels", labels[:, ::2]),
        ("labels", labels[:, :, :0]),
        ("step", step[:1]),
        ("scale", 0.0),
        ("scale", float("nan")),
        ("first", -1),
        ("first", 21),
        ("ends", good["ends"][:2]),
        ("keep", good["keep"].long()),
        ("block", 3),
        ("block", 0),
        ("block", 32),
        ("chosen", good["chosen"][:, :1]),
        ("counts", good["counts"][:2]),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            gpu.select_blocks(**good | {name: wrong})


@pytest.mark.gpu
def test_real_sizes(cuda):
    labels, step = made(1, 8, 131072, 16)
    q, ends, keep = normal(2, 2, 32, 16) / 4, [16380, 9000], [[1024] * 8, [37] * 8]
    expected = choice("cpu", q, labels, step, 1, ends, keep, 8, reference.select)
    found = choice(cuda, q, labels, step, 1, ends, keep, 8)
    for t in range(2):
        for h in range(8):  # what float32 cannot tell apart may change places
            assert len(found[t][h]) == len(expected[t][h])
            assert len(set(found[t][h]) & set(expected[t][h])) >= len(expected[t][h]) - 2
