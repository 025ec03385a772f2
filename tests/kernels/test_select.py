import numpy as np
import pytest
import torch

from flashrt_kernels.labels import label_shape

from .helpers import cpu, normal, reference
from .test_labels import unpacked


def made(seed, heads, context, channels):
    """Random labels, and a step for each channel."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 256, label_shape(heads, context, channels), np.uint8)
    return labels, random.uniform(0.1, 0.5, (heads, channels)).astype(np.float32)


def weights_of(q, labels, step, scale, first, end, block):
    """What each candidate weighs for one row of q [H, r], as [KVH, end - first]."""
    heads, channels = step.shape
    w = q.reshape(heads, -1, channels) * step[:, None]
    top = np.abs(w).max(2, keepdims=True)
    codes = np.rint(w * (np.float32(127) / top)).astype(np.int64)
    tokens = unpacked(labels)[:, first * block : end * block].astype(np.int64)
    scores = (codes @ tokens.transpose(0, 2, 1)) * (scale * (top.astype(np.float64) / 127))
    weights = np.exp(scores - scores.max(2, keepdims=True))
    weights = (weights / weights.sum(2, keepdims=True)).sum(1)
    return weights.reshape(heads, end - first, block).sum(2)


def choice(q, labels, step, scale, first, ends, keep, block, room=None):
    """What `select` chooses, as lists [T][KVH]."""
    ends, keep = np.array(ends, np.int32), np.array(keep, np.int32)
    most = room or max(1, min(keep.max(), max(ends.max() - first, 0)))
    chosen, counts = np.full((*keep.shape, most), -7, np.int32), np.full(keep.shape, -7, np.int32)
    cpu.select(q, labels, step, scale, first, ends, keep, block, chosen, counts)
    for t, h in np.ndindex(keep.shape):
        assert (chosen[t, h, counts[t, h] :] == -7).all()  # nothing is written behind
    return [[chosen[t, h, : counts[t, h]].tolist() for h in range(keep.shape[1])] for t in range(len(keep))]


def assert_heaviest(found, weights, first, keep):
    """`found` are as many as there should be, ascending, and none that was left out weighs clearly more."""
    candidates = len(weights)
    assert len(found) == min(keep, candidates)
    assert found == sorted(set(found))
    places = np.array(found, int) - first
    assert ((places >= 0) & (places < candidates)).all()
    others = np.delete(weights, places)
    if len(found) and len(others):
        assert weights[places].min() >= others.max() * (1 - 2e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels", "block"),
    [(12, 2, 32, 8), (1, 1, 8, 1), (9, 3, 24, 2), (4, 1, 40, 4), (22, 2, 16, 16), (8, 8, 128, 8)],
)
@pytest.mark.parametrize(("context", "first", "ends"), [(64, 0, [32, 64, 17]), (2000, 8, [1968, 1024, 48, 32, 16, 0])])
def test_select_matches_a_plain_model(isa, heads, kv_heads, channels, block, context, first, ends):
    labels, step = made(1, kv_heads, context, channels)
    ends, first = [end // block for end in ends], first // block
    q = normal(2, len(ends), heads, channels) / np.float32(channels**0.5)
    keep = np.random.default_rng(3).integers(0, 20, (len(ends), kv_heads))
    found = choice(q, labels, step, 0.25, first, ends, keep, block)
    for t, end in enumerate(ends):
        weights = weights_of(q[t], labels, step, 0.25, first, max(end, first), block) if end > first else None
        for h in range(kv_heads):
            if weights is None:
                assert found[t][h] == []
            else:
                assert_heaviest(found[t][h], weights[h], first, keep[t, h])


def test_select_matches_the_reference(isa):
    labels, step = made(1, 2, 1000, 32)
    q, ends = normal(2, 3, 6, 32) / np.float32(6), np.array([120, 60, 1], np.int32)
    keep = np.array([[10, 1], [0, 200], [3, 3]], np.int32)
    chosen, counts = torch.full((3, 2, 60), -1, dtype=torch.int32), torch.empty(3, 2, dtype=torch.int32)
    tensors = map(torch.from_numpy, (q, labels, step))
    reference.select(*tensors, 0.2, 1, torch.from_numpy(ends), torch.from_numpy(keep), 8, chosen, counts)
    expected = [[chosen[t, h, : counts[t, h]].tolist() for h in range(2)] for t in range(3)]
    assert choice(q, labels, step, 0.2, 1, ends, keep, 8, room=60) == expected
    assert [len(row) for row in expected[1]] == [0, 59]


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_of_equals_the_earlier(isa, block):
    """Blocks with the same labels weigh the same wherever they lie: in another chunk, beside other scores."""
    labels, step = made(1, 2, 1600, 16)
    codes = unpacked(labels)
    random = np.random.default_rng(5)
    kinds = random.integers(0, 16, (6, 2, block, 16))
    order = random.integers(0, 6, 1600 // block)
    for b, kind in enumerate(order):
        codes[:, b * block : (b + 1) * block] = kinds[kind]
    labels = packed(codes)
    assert np.array_equal(unpacked(labels), codes)
    q = normal(2, 1, 6, 16) / 4
    first, end = 16 // block, 1600 // block - 3
    weights = weights_of(q[0], labels, step, 0.3, first, end, block)
    for keep in (1, 5, end // 3, end - first - 1):
        found = choice(q, labels, step, 0.3, first, [end], [[keep, keep]], block)[0]
        for h in range(2):
            rank = np.argsort(-np.round(weights[h] / weights[h].max(), 9), kind="stable")
            assert found[h] == (first + np.sort(rank[:keep])).tolist()


def packed(codes):
    """codes [KVH, positions, channels] → labels."""
    heads, positions, channels = codes.shape
    nibbles = codes.reshape(heads, positions // 16, 16, channels // 8, 2, 4).astype(np.uint8)
    return np.ascontiguousarray((nibbles[..., 0, :] | nibbles[..., 1, :] << 4).transpose(0, 1, 3, 2, 4))


def test_equal_weights_everywhere(isa):
    """A query of zeros cannot tell tokens apart."""
    labels, step = made(1, 1, 800, 8)
    q = np.zeros((1, 2, 8), np.float32)
    assert choice(q, labels, step, 1.0, 2, [90], [[7]], 8) == [[list(range(2, 9))]]


def test_sharp_scores(isa):
    """Weights that differ by more than a float has room for."""
    labels, step = made(1, 2, 4000, 32)
    q = normal(2, 1, 4, 32) * 10
    found = choice(q, labels, step, 1.0, 1, [500], [[40, 1]], 8)[0]
    weights = weights_of(q[0], labels, step, 1.0, 1, 500, 8)
    assert [len(row) for row in found] == [40, 1]
    for h in range(2):
        assert set(1 + np.flatnonzero(weights[h] > 1e-30)) <= set(found[h]) or len(found[h]) == 1
        assert 1 + weights[h].argmax() in found[h]


def test_rows_and_threads_do_not_matter(isa):
    labels, step = made(1, 3, 9000, 24)
    q = normal(2, 7, 9, 24) / 8
    ends = [1100, 1125, 17, 500, 1, 900, 64]
    keep = np.random.default_rng(3).integers(0, 300, (7, 3))
    cpu.set_threads(2)
    whole = choice(q, labels, step, 0.5, 1, ends, keep, 8, room=300)
    cpu.set_threads(1)
    assert choice(q, labels, step, 0.5, 1, ends, keep, 8, room=300) == whole
    cpu.set_threads(3)
    for t in range(7):
        alone = choice(q[t : t + 1], labels, step, 0.5, 1, ends[t : t + 1], keep[t : t + 1], 8, room=300)
        assert alone == whole[t : t + 1]


def test_labels_of_others_are_not_looked_at(isa):
    labels, step = made(1, 1, 512, 16)
    q = normal(2, 1, 3, 16) / 4
    found = choice(q, labels, step, 0.5, 3, [37], [[9]], 8)
    codes = unpacked(labels)
    codes[:, :24] = 15 - codes[:, :24]
    codes[:, 37 * 8 :] = 15 - codes[:, 37 * 8 :]
    assert choice(q, packed(codes), step, 0.5, 3, [37], [[9]], 8) == found


def test_wrong_arguments_are_named():
    labels, step = made(1, 2, 160, 16)
    scratch = np.empty(cpu.select_scratch_bytes(6, 2, 160, 8), np.uint8)
    good = {
        "q": normal(1, 3, 6, 16),
        "labels": labels,
        "step": step,
        "scale": 0.5,
        "first": 1,
        "ends": np.array([20, 10, 0], np.int32),
        "keep": np.array([[4, 2], [100, 4], [0, 1]], np.int32),
        "block": 8,
        "chosen": np.zeros((3, 2, 9), np.int32),
        "counts": np.zeros((3, 2), np.int32),
        "scratch": scratch,
    }
    cpu.select(**good)
    assert good["counts"].tolist() == [[4, 2], [9, 4], [0, 0]]
    for name, wrong in [
        ("q", normal(1, 3, 6, 24)),
        ("q", normal(1, 3, 12, 16)[:, ::2]),
        ("labels", labels[:, :, :1]),
        ("labels", made(1, 4, 160, 16)[0]),
        ("labels", labels[:, ::2]),
        ("step", step[:1]),
        ("step", step * 0),
        ("step", np.ones((2, 20), np.float32)),
        ("scale", 0.0),
        ("scale", -1.0),
        ("scale", float("nan")),
        ("first", -1),
        ("first", 21),
        ("ends", np.array([21, 10, 0], np.int32)),
        ("ends", np.array([20, 10, -1], np.int32)),
        ("ends", np.array([20, 10], np.int32)),
        ("keep", np.array([[4, 2], [100, 4], [0, -1]], np.int32)),
        ("keep", np.array([[4, 2], [100, 4]], np.int32)),
        ("keep", good["keep"].astype(np.int64)),
        ("block", 3),
        ("block", 0),
        ("block", 32),
        ("chosen", np.zeros((3, 2, 8), np.int32)),
        ("chosen", np.zeros((3, 1, 9), np.int32)),
        ("counts", np.zeros((2, 2), np.int32)),
        ("scratch", scratch[:-1]),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.select(**good | {name: wrong})
    with pytest.raises(ValueError, match="^block"):
        cpu.select_scratch_bytes(6, 2, 160, 5)
    with pytest.raises(ValueError, match="^kv_heads"):
        cpu.select_scratch_bytes(6, 4, 160, 8)
