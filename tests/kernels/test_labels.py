import numpy as np
import pytest
import torch

from flashrt_kernels.labels import label_shape

from .helpers import cpu, normal, reference


def ranges(seed, heads, channels):
    random = np.random.default_rng(seed)
    low = random.uniform(-3, -1, (heads, channels)).astype(np.float32)
    return low, random.uniform(0.1, 0.5, (heads, channels)).astype(np.float32)


def unpacked(labels):
    """labels [KVH, groups, channels / 8, 16, 4] → codes [KVH, positions, channels]."""
    heads, groups, eights = labels.shape[:3]
    codes = np.empty((heads, groups * 16, eights * 8), np.uint8)
    for t in range(groups * 16):
        for c in range(eights * 8):
            byte = labels[:, t // 16, c // 8, t % 16, c % 4]
            codes[:, t, c] = byte >> 4 if c % 8 >= 4 else byte & 15
    return codes


@pytest.mark.parametrize(("heads", "channels"), [(1, 8), (2, 32), (3, 24), (5, 40), (1, 256)])
@pytest.mark.parametrize(("position", "tokens"), [(0, 1), (0, 100), (13, 5), (37, 63), (99, 1)])
def test_codes_and_their_places(isa, heads, channels, position, tokens):
    low, step = ranges(1, heads, channels)
    fused = normal(2, tokens, heads + 1, channels)
    values = fused[:, :heads]  # rows with a stride
    before = np.random.default_rng(3).integers(0, 256, label_shape(heads, 100, channels), np.uint8)
    labels, other = before.copy(), torch.from_numpy(before.copy())
    cpu.label_append(values, low, step, labels, position)
    reference.label_append(*map(torch.from_numpy, (values, low, step)), other, position)
    assert np.array_equal(labels, other.numpy())
    expected = unpacked(before)
    codes = np.clip(np.rint((values - low) / step), 0, 15).astype(np.uint8)
    expected[:, position : position + tokens] = codes.transpose(1, 0, 2)
    assert np.array_equal(unpacked(labels), expected)
    assert len(np.unique(codes)) > 8 or codes.size < 100


def test_halves_go_to_even(isa):
    """And what is not a number is zero."""
    values = np.array([[[0.5, 1.5, 2.5, 14.5, 15.5, -0.5, 1e30, np.nan]]], np.float32)
    labels = np.zeros(label_shape(1, 16, 8), np.uint8)
    cpu.label_append(values, np.zeros((1, 8), np.float32), np.ones((1, 8), np.float32), labels, 3)
    assert unpacked(labels)[0, 3].tolist() == [0, 2, 2, 14, 15, 0, 15, 0]


def test_threads_and_calls_do_not_matter(isa):
    low, step = ranges(1, 2, 16)
    values = normal(2, 300, 2, 16)
    whole, parts = (np.zeros(label_shape(2, 300, 16), np.uint8) for _ in range(2))
    cpu.label_append(values, low, step, whole, 0)
    cpu.set_threads(1)
    for start in range(0, 300, 7):
        cpu.label_append(values[start : start + 7], low, step, parts, start)
    assert np.array_equal(parts, whole)


def test_wrong_arguments_are_named():
    low, step = ranges(1, 2, 16)
    labels = np.zeros(label_shape(2, 64, 16), np.uint8)
    good = {"values": normal(1, 3, 2, 16), "low": low, "step": step, "labels": labels, "position": 61}
    cpu.label_append(**good)
    for name, wrong in [
        ("values", normal(1, 3, 1, 16)),
        ("values", normal(1, 3, 2, 24)),
        ("values", normal(1, 3, 2, 32)[:, :, ::2]),
        ("low", low[:1]),
        ("low", np.full_like(low, np.nan)),
        ("step", np.zeros_like(step)),
        ("step", -step),
        ("step", step[:, :12]),
        ("step", np.ones((2, 584), np.float32)),
        ("labels", labels[:, :, :1]),
        ("labels", labels[:, ::2]),
        ("labels", labels.astype(np.int32)),
        ("labels", labels[0]),
        ("position", 62),
        ("position", -1),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.label_append(**good | {name: wrong})
    with pytest.raises(ValueError, match="^position"):
        reference.label_append(*map(torch.from_numpy, (good["values"], low, step, labels)), 62)
