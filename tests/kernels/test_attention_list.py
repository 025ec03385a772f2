import numpy as np
import pytest
import torch

from flashrt_kernels.kv import KvCodec

from .helpers import cpu, empty, normal, numbers, reference, rms_ratio, same
from .test_attention import CODEC, TREES, cache, paths


def attended(q, near, far, lists, scale=0.2, softcap=None, sinks=None):
    """Attention over lists [T][KVH], in arrays that are longer than they need be."""
    tokens, kv_heads = len(lists), len(lists[0])
    most = max(len(each) for row in lists for each in row) + 3
    packed, counts = np.full((tokens, kv_heads, most), 1 << 30, np.int32), np.empty((tokens, kv_heads), np.int32)
    for t, h in np.ndindex(tokens, kv_heads):
        counts[t, h] = len(lists[t][h])
        packed[t, h, : counts[t, h]] = lists[t][h]
    out = empty(tokens, q.shape[1] * q.shape[2])
    cpu.attention_list(q, near, far, packed, counts, scale, softcap, out, None, sinks)
    return out, packed, counts


def plain(q, near, far, lists, scale, softcap):
    """The same in numpy, float64."""
    tokens, heads, dim = q.shape
    group = heads // len(lists[0])
    out = np.zeros((tokens, heads, dim))
    for t, h in np.ndindex(tokens, heads):
        pairs = np.array([near[h // group, i] if i >= 0 else far[-1 - i] for i in lists[t][h // group]], np.float64)
        if not len(pairs):
            continue
        scores = pairs[:, 0] @ q[t, h].astype(np.float64) * scale
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[t, h] = weights @ pairs[:, 1] / weights.sum()
    return out.reshape(tokens, -1)


def widened(kv, dim):
    """[heads, positions, 2, dim]"""
    return np.stack(numbers(kv, dim), 2)


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "softcap"),
    [
        (12, 2, 128, None),
        (9, 3, 20, None),
        (5, 1, 80, 20.0),
        (4, 4, 256, None),
        (3, 1, 512, None),
        (22, 2, 10, 5.0),
        (7, 7, 1, None),
    ],
)


@CODEC
@SHAPES
def test_matches_a_plain_model_and_the_reference(isa, codec, heads, kv_heads, dim, softcap):
    near, near_tensor = cache(1, kv_heads, 900, dim, codec)
    far, far_tensor = cache(5, 1, 400, dim, codec)
    far, far_tensor = far[0], far_tensor[0]
    random = np.random.default_rng(7)
    lists = [[random.integers(-400, 900, n).tolist() for _ in range(kv_heads)] for n in (1, 256, 0, 257, 700)]
    lists[0][0] = []
    q, scale = normal(3, 5, heads, dim), dim**-0.5
    out, packed, counts = attended(q, near, far, lists, scale, softcap)
    tolerance = 5e-6 if dim <= 256 else 1e-5  # errors of products that softmax magnifies
    assert rms_ratio(out, plain(q, widened(near, dim), widened(far[None], dim)[0], lists, scale, softcap)) < tolerance
    expected = torch.full(out.shape, torch.nan)
    tensors = (torch.from_numpy(q), near_tensor, far_tensor, torch.from_numpy(packed), torch.from_numpy(counts))
    reference.attention_list(*tensors, scale, softcap, expected)
    assert rms_ratio(out, expected) < tolerance
    assert not out[2].any()
    sinks = normal(6, heads) * 4 + 12
    out = attended(q, near, far, lists, scale, softcap, sinks)[0]
    assert rms_ratio(out, expected) > 1e-3
    reference.attention_list(*tensors, scale, softcap, expected, None, torch.from_numpy(sinks))
    assert rms_ratio(out, expected) < tolerance
    assert not out[2].any()


@CODEC
@SHAPES
def test_has_the_bits_of_attention(isa, codec, heads, kv_heads, dim, softcap):
    """Over all positions: as one row, and as one of any number of rows, whatever the threads."""
    near, _ = cache(1, kv_heads, 1100, dim, codec)
    for start, tokens, threads in ((0, 1, 2), (0, 16, 1), (250, 13, 2), (511, 2, 3), (1090, 10, 1), (1099, 1, 2)):
        cpu.set_threads(threads)
        q, dense = normal(3, tokens, heads, dim), empty(tokens, heads * dim)
        for sinks in (None, normal(6, heads)):
            cpu.attention(q, near, start, None, 0.2, softcap, dense, sinks=sinks)
            lists = [[range(start + t + 1)] * kv_heads for t in range(tokens)]
            assert same(attended(q, near, None, lists, softcap=softcap, sinks=sinks)[0], dense)


@CODEC
def test_where_tokens_lie_does_not_matter(isa, codec):
    """The same tokens in near memory, in another order there, or in far memory."""
    near, _ = cache(1, 2, 600, 64, codec)
    q, dense = normal(3, 1, 6, 64), empty(1, 6 * 64)
    cpu.attention(q, near, 599, None, 0.2, None, dense)
    random = np.random.default_rng(7)
    order = random.permutation(600)
    where = np.argsort(order)
    mixed = np.ascontiguousarray(near[:, order])
    far = np.concatenate((near[0], near[1]))
    lists = [[where.copy(), where.copy()]]
    for h in range(2):
        away = random.random(600) < 0.5
        lists[0][h][away] = -1 - (600 * h + np.flatnonzero(away))
    assert same(attended(q, mixed, far, lists)[0], dense)


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES)
def test_a_path_of_a_tree_has_its_bits(isa, parents):
    count, heads, kv_heads, dim = len(parents), 6, 2, 40
    q, k, v = normal(3, count, heads, dim), normal(4, count, kv_heads, dim), normal(5, count, kv_heads, dim)
    for start in (0, 37, 250, 509):
        kv, _ = cache(1, kv_heads, 600, dim, KvCodec.BF16)
        cpu.kv_append(k, v, kv, start)
        dense = empty(count, heads * dim)
        cpu.attention(q, kv, start, None, 0.2, None, dense, parents=np.array(parents, np.int32))
        lists = [[[*range(start), *(start + i for i in path)]] * kv_heads for path in paths(parents)]
        assert same(attended(q, kv, None, lists)[0], dense)


def test_rows_and_threads_do_not_matter(isa):
    """Lists longer than a wave of segments, beside short ones."""
    near, _ = cache(1, 1, 3000, 32, KvCodec.BF16)
    random = np.random.default_rng(7)
    lists = [[random.integers(0, 3000, n)] for n in (20000, 17, 513, 256, 0, 3000)]
    q = normal(3, 6, 3, 32)
    cpu.set_threads(2)
    whole, _, _ = attended(q, near, None, lists)
    cpu.set_threads(1)
    assert same(attended(q, near, None, lists)[0], whole)
    cpu.set_threads(3)
    for t in range(6):
        assert same(attended(q[t : t + 1], near, None, lists[t : t + 1])[0], whole[t : t + 1])


def test_others_are_not_read(isa):
    near, _ = cache(1, 2, 64, 16, KvCodec.F32)
    q, lists = normal(3, 2, 4, 16), [[[3, 9], [4]], [[5], [60, 3]]]
    expected, _, _ = attended(q, near, None, lists)
    kept = near.copy()
    near[:] = np.nan
    near[0, [3, 9, 5]], near[1, [4, 60, 3]] = kept[0, [3, 9, 5]], kept[1, [4, 60, 3]]
    assert same(attended(q, near, None, lists)[0], expected)


def test_wrong_arguments_are_named():
    near, _ = cache(1, 2, 32, 16, KvCodec.F32)
    far = np.ascontiguousarray(near[0, :5])
    scratch = np.empty(cpu.attention_list_scratch_bytes(3, 4, 2, 16), np.uint8)
    lists, counts = np.zeros((3, 2, 7), np.int32), np.full((3, 2), 7, np.int32)
    lists[1, 1, 2:4] = -5, 31
    good = {
        "q": normal(1, 3, 4, 16),
        "near": near,
        "far": far,
        "lists": lists,
        "counts": counts,
        "scale": 1.0,
        "softcap": None,
        "out": empty(3, 64),
        "scratch": scratch,
    }
    cpu.attention_list(**good)
    beyond, before = lists.copy(), lists.copy()
    beyond[2, 1, 6], before[2, 1, 6] = 32, -6
    for name, wrong in [
        ("q", normal(1, 3, 8, 16)[:, ::2]),
        ("q", normal(1, 3, 4, 577)),
        ("near", near.astype(np.float64)),
        ("near", near[:, :, :, :8]),
        ("near", near[:, ::2]),
        ("near", np.zeros((3, 32, 2, 16), np.float32)),
        ("far", far[:, :, :8]),
        ("far", far[::2]),
        ("far", far.astype(np.uint16)),
        ("lists", lists[:2]),
        ("lists", lists[:, :, ::2]),
        ("lists", lists.astype(np.int64)),
        ("lists", beyond),
        ("lists", before),
        ("counts", counts[:, :1]),
        ("counts", counts + 1),
        ("counts", counts - 8),
        ("out", empty(3, 63)),
        ("scratch", scratch[:-1]),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.attention_list(**good | {name: wrong})
    with pytest.raises(ValueError, match="^lists"):
        cpu.attention_list(**good | {"far": None})
    with pytest.raises(ValueError, match="^kv_heads"):
        cpu.attention_list_scratch_bytes(3, 4, 3, 16)
