import gguf
import numpy as np
import pytest
import torch

from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT as SEGMENT

from .helpers import cpu, empty, normal, numbers, reference, rms_ratio, same

CODEC = pytest.mark.parametrize("codec", KvCodec)
WIDE = pytest.mark.parametrize("wide", [False, True])  # rows of a pass of few, or of many


def tensor_of(kv):
    """A cache as a tensor, which shares its memory."""
    return torch.from_numpy(kv.view(np.int16)).view(torch.bfloat16) if kv.dtype == np.uint16 else torch.from_numpy(kv)


def cache(seed, kv_heads, context, dim, codec):
    """A cache full of keys and values, and the same as a tensor."""
    kv = np.zeros((kv_heads, context, *codec.pair(dim)), codec.dtype)
    k, v = normal(seed, context, kv_heads, dim), normal(seed + 1, context, kv_heads, dim)
    cpu.kv_append(k, v, kv, 0)
    return kv, tensor_of(kv)


@CODEC
@pytest.mark.parametrize("dim", [24, 64, 80, 97])
def test_kv_append(isa, codec, dim):
    k, v = 30 * normal(1, 5, 3, dim), normal(2, 5, 3, dim)
    k[1, 2], v[2, 1, :40] = 0, 0
    k[0, 0, 3], v[1, 1, 20], v[3, 2, 7] = np.nan, np.inf, -np.inf
    kv = np.zeros((3, 11, *codec.pair(dim)), codec.dtype)
    other = tensor_of(kv.copy())
    fused = np.concatenate((k, v), 1)
    cpu.kv_append(fused[:, :3], fused[:, 3:], kv, 4)
    reference.kv_append(torch.from_numpy(k), torch.from_numpy(v), other, 4)
    held = other.view(torch.int16).numpy().view(np.uint16) if codec is KvCodec.BF16 else other.numpy()
    for ours, theirs, given in zip(numbers(kv, dim), numbers(held, dim), (k, v), strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)
        lost = ~np.isfinite(given.swapaxes(0, 1))
        assert not np.isfinite(ours[:, 4:9][lost]).any()  # and with it, of blocks, whatever shares its scale
    k, v = np.nan_to_num(k, posinf=1), np.nan_to_num(v, posinf=1, neginf=-1)
    cpu.kv_append(k, v, kv, 4)
    reference.kv_append(torch.from_numpy(k), torch.from_numpy(v), other, 4)
    assert np.array_equal(kv.view(np.uint8), other.view(torch.uint8).numpy().reshape(kv.view(np.uint8).shape))


@pytest.mark.parametrize("codec", [KvCodec.INT8, KvCodec.INT4])
@pytest.mark.parametrize("scale", [1.0, 3e-7, 3e3])  # scales that are subnormal, or large, in float16
def test_blocks_are_those_of_gguf_files(isa, codec, scale):
    """Bytes and numbers are those of the gguf package."""
    k, v = scale * normal(1, 7, 2, 96), scale * normal(2, 7, 2, 96)
    kv = np.zeros((2, 7, *codec.pair(96)), np.uint8)
    cpu.kv_append(k, v, kv, 0)
    kinds = [getattr(gguf.GGMLQuantizationType, blocks.name) for blocks in codec.blocks]
    padded = [np.pad(x.swapaxes(0, 1), ((0, 0), (0, 0), (0, 32))) for x in (k, v)]
    rows = [gguf.quants.quantize(x, kind) for x, kind in zip(padded, kinds, strict=True)]
    assert np.array_equal(kv[:, :, 0], np.concatenate(rows, 2))
    for found, own, kind in zip(numbers(kv, 96), rows, kinds, strict=True):
        assert np.array_equal(found, gguf.quants.dequantize(own, kind)[:, :, :96])


@CODEC
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [
        (4, 1, 48, None, None),
        (8, 2, 64, 100, None),
        (6, 6, 80, None, 20.0),
        (3, 1, 10, 7, None),
        (2, 1, 256, 300, 5.0),
        (4, 2, 512, 90, None),
        (5, 1, 96, 40, 20.0),
    ],
)
@WIDE
def test_attention_matches_reference(isa, wide, codec, heads, kv_heads, dim, window, softcap):
    kv, tensor = cache(1, kv_heads, 700, dim, codec)
    halves = wide and isa == "amx" and codec is KvCodec.BF16 and dim % 32 == 0  # queries and weights of 16 bits
    tolerance = 2e-5 if halves else 5e-6 if dim <= 256 else 1e-5  # errors of products that softmax magnifies
    for start, tokens in ((0, 1), (0, 17), (255, 1), (300, 5), (100, 123), (690, 10)):
        q, out = normal(3, tokens, heads, dim), empty(tokens, heads * dim)
        cpu.attention(q, kv, start, window, dim**-0.5, softcap, out, wide=wide)
        expected = torch.empty(tokens, heads * dim)
        reference.attention(torch.from_numpy(q), tensor, start, window, dim**-0.5, softcap, expected)
        assert rms_ratio(out, expected) < tolerance
        sinks = normal(6, heads) * 4 + 12
        cpu.attention(q, kv, start, window, dim**-0.5, softcap, out, sinks=sinks, wide=wide)
        assert rms_ratio(out, expected) > 2 * tolerance
        beside = torch.from_numpy(sinks)
        reference.attention(torch.from_numpy(q), tensor, start, window, dim**-0.5, softcap, expected, sinks=beside)
        assert rms_ratio(out, expected) < tolerance


def test_sinks_are_scores_without_values(isa):
    """Beside a model in float64 that says so: the reference follows the same path as the kernels."""
    heads, kv_heads, dim, context = 6, 2, 20, 530
    kv, _ = cache(1, kv_heads, context, dim, KvCodec.F32)
    q, sinks, out = normal(3, 1, heads, dim), normal(4, heads) * 3, empty(1, heads * dim)
    cpu.attention(q, kv, context - 1, None, 0.2, None, out, sinks=sinks)
    for head in range(heads):
        keys, values = (kv[head // 3, :, part].astype(np.float64) for part in (0, 1))
        scores = np.append(keys @ q[0, head].astype(np.float64) * 0.2, sinks[head])
        weights = np.exp(scores - scores.max())
        expected = weights[:-1] @ values / weights.sum()
        assert rms_ratio(out[0, head * dim : (head + 1) * dim], expected) < 5e-6


@CODEC
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 40), (3, 3, 40), (6, 1, 64)])
@WIDE
def test_attention_is_invariant(isa, wide, codec, window, heads, kv_heads, dim):
    context = 600
    kv, _ = cache(1, kv_heads, context, dim, codec)
    q, whole = normal(3, context, heads, dim), empty(context, heads * dim)
    cpu.attention(q, kv, 0, window, 0.2, None, whole, wide=wide)
    for threads, start, tokens in ((1, 0, 1), (2, 599, 1), (3, 250, 13), (2, 256, 16), (1, 57, 300), (2, 511, 2)):
        cpu.set_threads(threads)
        out = empty(tokens, heads * dim)
        cpu.attention(q[start : start + tokens], kv, start, window, 0.2, None, out, wide=wide)
        assert same(out, whole[start : start + tokens])


def test_longest_waves():
    """More segments than run in parallel at once."""
    kv, tensor = cache(1, 2, 5000, 32, KvCodec.BF16)
    q, out, expected = normal(3, 2, 4, 32), empty(2, 128), torch.empty(2, 128)
    cpu.attention(q, kv, 4990, None, 0.2, None, out)
    reference.attention(torch.from_numpy(q), tensor, 4990, None, 0.2, None, expected)
    assert rms_ratio(out, expected) < 5e-6
    alone = empty(1, 128)
    cpu.attention(q[1:], kv, 4991, None, 0.2, None, alone)
    assert same(alone, out[1:])


def test_the_future_is_not_read():
    """What lies behind a token's position, even not-a-number, does not reach its result."""
    kv, _ = cache(1, 2, 64, 16, KvCodec.F32)
    q, out, again = normal(3, 4, 4, 16), empty(4, 64), empty(4, 64)
    cpu.attention(q, kv, 20, None, 0.25, None, out)
    kv[:, 24:] = np.nan
    cpu.attention(q, kv, 20, None, 0.25, None, again)
    assert same(again, out)


def test_wrong_arguments_are_named():
    kv, _ = cache(1, 2, 32, 16, KvCodec.F32)
    q, out = normal(1, 3, 4, 16), empty(3, 64)
    good = {"q": q, "kv": kv, "start": 0, "window": None, "scale": 1.0, "softcap": None, "out": out}
    for name, wrong in [
        ("q", q.astype(np.float16)),
        ("q", normal(1, 3, 8, 16)[:, ::2]),
        ("kv", kv.astype(np.float64)),
        ("kv", kv[:, :, :, :8]),
        ("kv", kv[:, ::2]),
        ("kv", np.zeros((2, 32, 1, 71), np.uint8)),
        ("kv", np.zeros((2, 32, 2, 68), np.uint8)),
        ("start", 30),
        ("start", -1),
        ("window", 0),
        ("out", empty(3, 63)),
        ("scratch", np.empty(16, np.uint8)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.attention(**good | {name: wrong})
    with pytest.raises(ValueError, match="^kv"):
        cpu.attention(normal(1, 3, 3, 16), kv, 0, None, 1.0, None, empty(3, 48))
    with pytest.raises(ValueError, match="^v"):
        cpu.kv_append(normal(1, 2, 2, 16), normal(1, 2, 2, 15), kv, 0)
    with pytest.raises(ValueError, match="^start"):
        cpu.kv_append(normal(1, 2, 2, 16), normal(1, 2, 2, 16), kv, 31)


def paths(parents):
    """For each token of a tree, those that it follows and itself."""
    result = []
    for i, parent in enumerate(parents):
        result.append([*(result[parent] if parent >= 0 else []), i])
    return result


TREES = {
    "one": [-1],
    "roots": [-1, -1, -1],
    "chain": list(range(-1, 15)),
    "wide": [-1, -1, 0, 0, 1, 2, 2, 2, 4, 5, 8, 3, 9, 12, -1, 13],
}


@CODEC
@pytest.mark.parametrize("parents", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "softcap"),
    [(4, 2, 40, None, None), (9, 1, 64, 5, None), (6, 6, 10, 300, 20.0), (8, 1, 32, 1, None)],
)
def test_a_tree_has_the_bits_of_its_paths(isa, codec, parents, heads, kv_heads, dim, window, softcap):
    """Wherever the tree begins: in the middle of a segment, before or across its end, at nothing."""
    context, count = 600, len(parents)
    q, k, v = normal(3, count, heads, dim), normal(4, count, kv_heads, dim), normal(5, count, kv_heads, dim)
    for start, threads in ((0, 1), (37, 2), (250, 3), (255, 2), (256, 1), (509, 2)):
        cpu.set_threads(threads)
        kv, _ = cache(1, kv_heads, context, dim, codec)
        cpu.kv_append(k, v, kv, start)
        out = empty(count, heads * dim)
        options = {"parents": np.array(parents, np.int32)}
        options["sinks"] = sinks = normal(6, heads) if start % 2 else None
        cpu.attention(q, kv, start, window, dim**-0.5, softcap, out, **options)
        for i, path in enumerate(paths(parents)):
            kv, _ = cache(1, kv_heads, context, dim, codec)
            cpu.kv_append(k[path], v[path], kv, start)
            row = empty(len(path), heads * dim)
            cpu.attention(q[path], kv, start, window, dim**-0.5, softcap, row, sinks=sinks)
            assert same(out[i : i + 1], row[-1:])


@pytest.mark.parametrize("window", [None, 3, 40])
def test_a_tree_matches_the_reference(isa, window):
    parents, heads, kv_heads, dim = TREES["wide"], 6, 2, 24
    q, start = normal(3, len(parents), heads, dim), 250
    kv, tensor = cache(1, kv_heads, 300, dim, KvCodec.BF16)
    out, expected = empty(len(parents), heads * dim), torch.empty(len(parents), heads * dim)
    tree = np.array(parents, np.int32)
    cpu.attention(q, kv, start, window, 0.2, None, out, parents=tree)
    reference.attention(torch.from_numpy(q), tensor, start, window, 0.2, None, expected, parents=torch.from_numpy(tree))
    assert rms_ratio(out, expected) < 5e-6


@pytest.mark.parametrize("parents", [[0, 0, 1], [-1, 1, 0], [-2, 0, 1], [-1, 0], list(range(-1, 16))])
def test_what_is_no_tree_is_refused(parents):
    kv, _ = cache(1, 2, 64, 16, KvCodec.F32)
    tokens = max(len(parents), 3)
    with pytest.raises(ValueError, match="^parents"):
        cpu.attention(
            normal(1, tokens, 4, 16), kv, 0, None, 1.0, None, empty(tokens, 64), parents=np.array(parents, np.int32)
        )


def by_pages(q, kv, far, start, scale, softcap, out, sinks=None, **options):
    """Attention whose first `far` positions come in pages of a segment, or of three."""
    tokens, heads, _ = q.shape
    state = empty(tokens, heads, cpu.attention_state_width(out.shape[1] // heads))
    step = SEGMENT if far % (3 * SEGMENT) else 3 * SEGMENT
    for begin in range(0, far, step):
        page = np.ascontiguousarray(kv[:, begin : begin + step])
        cpu.attend_page(q, page, scale, softcap, state, begin == 0, None, sinks, options.get("wide", False))
    near = np.ascontiguousarray(kv[:, far:])
    cpu.attention(q, near, start - far, None, scale, softcap, out, state=state, **options)


@CODEC
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "softcap"),
    [(4, 1, 48, None), (8, 2, 64, None), (3, 3, 10, 20.0), (14, 2, 256, 5.0), (5, 1, 500, None)],
)
@WIDE
def test_pages_give_the_bits_of_one_attention(isa, wide, codec, heads, kv_heads, dim, softcap):
    context = 11 * SEGMENT + 57
    kv, _ = cache(1, kv_heads, context, dim, codec)
    for far, start, tokens, threads in (
        (SEGMENT, SEGMENT, 1, 2),
        (3 * SEGMENT, 3 * SEGMENT + 7, 16, 1),
        (10 * SEGMENT, 10 * SEGMENT + 250, 5, 3),
        (2 * SEGMENT, 2 * SEGMENT + 19, 123, 2),
        (2 * SEGMENT, 10 * SEGMENT, 2, 2),
    ):
        cpu.set_threads(threads)
        q, out, whole = normal(3, tokens, heads, dim), empty(tokens, heads * dim), empty(tokens, heads * dim)
        for sinks in (None, normal(6, heads)):
            cpu.attention(q, kv, start, None, dim**-0.5, softcap, whole, sinks=sinks, wide=wide)
            by_pages(q, kv, far, start, dim**-0.5, softcap, out, sinks, wide=wide)
            assert same(out, whole)


@pytest.mark.parametrize("codec", [KvCodec.F32, KvCodec.BF16, KvCodec.INT8])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "values"), [(5, 1, 576, 512), (4, 2, 40, 24), (3, 3, 30, 22), (9, 1, 97, 96)]
)
def test_values_that_are_parts_of_keys(isa, codec, heads, kv_heads, dim, values):
    """A cache that holds keys alone gives the bits of one that holds them twice, and the reference's numbers."""
    context, scale, keys = 700, dim**-0.5, normal(1, 700, kv_heads, dim)
    twice, shared = (np.zeros((kv_heads, context, *codec.pair(dim, own)), codec.dtype) for own in (False, True))
    cpu.kv_append(keys, keys, twice, 0)
    cpu.kv_append(keys, None, shared, 0)
    written = tensor_of(np.zeros_like(shared))
    reference.kv_append(torch.from_numpy(keys), None, written, 0)
    assert np.array_equal(tensor_of(shared).view(torch.uint8), written.view(torch.uint8))
    for start, tokens in ((0, 1), (300, 5), (599, 101)):
        q, whole = normal(3, tokens, heads, dim), empty(tokens, heads * dim)
        cpu.attention(q, twice, start, None, scale, None, whole)
        expected = whole.reshape(tokens, heads, dim)[:, :, :values].reshape(tokens, -1)
        out, other = empty(tokens, heads * values), torch.empty(tokens, heads * values)
        cpu.attention(q, shared, start, None, scale, None, out)
        assert same(out, expected)
        reference.attention(torch.from_numpy(q), written, start, None, scale, None, other)
        assert rms_ratio(out, other) < 5e-6
        if start >= SEGMENT:
            by_pages(q, shared, SEGMENT, start, scale, None, out)
            assert same(out, expected)
        lists = np.tile(np.arange(context, dtype=np.int32), (tokens, kv_heads, 1))
        counts = np.repeat(np.arange(start + 1, start + tokens + 1, dtype=np.int32)[:, None], kv_heads, 1)
        cpu.attention_list(q, shared, None, lists, counts, scale, None, out)
        assert same(out, expected)
        cpu.attention(q, twice, start, None, scale, None, whole, wide=True)
        cpu.attention(q, shared, start, None, scale, None, out, wide=True)
        assert same(out, whole.reshape(tokens, heads, dim)[:, :, :values].reshape(tokens, -1))
        assert rms_ratio(out, other) < 2e-5


def test_wrong_values_of_caches_of_keys_are_named():
    kv, k = np.zeros((2, 32, 1, 16), np.float32), normal(1, 3, 2, 16)
    with pytest.raises(ValueError, match="^v: the cache holds keys alone"):
        cpu.kv_append(k, k, kv, 0)
    with pytest.raises(ValueError, match="^v: expected values"):
        cpu.kv_append(k, None, np.zeros((2, 32, 2, 16), np.float32), 0)
    with pytest.raises(ValueError, match="^out: expected 4 heads of up to 16 numbers, found 68"):
        cpu.attention(normal(1, 3, 4, 16), kv, 0, None, 1.0, None, empty(3, 68))


@pytest.mark.parametrize("parents", TREES.values(), ids=TREES)
def test_a_tree_over_pages(isa, parents):
    q, kv = normal(3, len(parents), 6, 24), cache(1, 2, 800, 24, KvCodec.BF16)[0]
    tree = np.array(parents, np.int32)
    for start in (SEGMENT, 2 * SEGMENT - 5, 2 * SEGMENT + 77):
        out, whole = empty(len(parents), 144), empty(len(parents), 144)
        cpu.attention(q, kv, start, None, 0.2, None, whole, parents=tree)
        by_pages(q, kv, SEGMENT, start, 0.2, None, out, parents=tree)
        assert same(out, whole)


def test_pages_match_the_reference(isa):
    kv, tensor = cache(1, 2, 700, 24, KvCodec.BF16)
    q, state = normal(3, 70, 6, 24), torch.full((70, 6, reference.attention_state_width(24)), torch.nan)
    out, again, expected = empty(70, 144), torch.empty(70, 144), torch.empty(70, 144)
    by_pages(q, kv, 2 * SEGMENT, 600, 0.2, 9.0, out)
    reference.attention(torch.from_numpy(q), tensor, 600, None, 0.2, 9.0, expected)
    for begin in (0, SEGMENT):
        page = tensor[:, begin : begin + SEGMENT]
        reference.attend_page(torch.from_numpy(q), page, 0.2, 9.0, state, begin == 0)
    near = tensor[:, 2 * SEGMENT :]
    reference.attention(torch.from_numpy(q), near, 600 - 2 * SEGMENT, None, 0.2, 9.0, again, state=state)
    assert rms_ratio(out, expected) < 5e-6
    assert rms_ratio(again.numpy(), expected) < 5e-6
    sinks = normal(6, 6) * 4 + 12
    by_pages(q, kv, 2 * SEGMENT, 600, 0.2, 9.0, out, sinks)
    for begin in (0, SEGMENT):
        page = tensor[:, begin : begin + SEGMENT]
        reference.attend_page(torch.from_numpy(q), page, 0.2, 9.0, state, begin == 0, None, torch.from_numpy(sinks))
    reference.attention(torch.from_numpy(q), near, 600 - 2 * SEGMENT, None, 0.2, 9.0, again, state=state)
    assert rms_ratio(out, again) < 5e-6
    assert rms_ratio(out, expected) > 0.01
    assert cpu.attention_state_width(24) == reference.attention_state_width(24)


def test_wrong_states_and_pages_are_named():
    kv, _ = cache(1, 2, 32, 16, KvCodec.F32)
    q, state, out = normal(1, 3, 4, 16), empty(3, 4, 18), empty(3, 64)
    with pytest.raises(ValueError, match="^window"):
        cpu.attention(q, kv, 0, 5, 1.0, None, out, state=state)
    good = {"q": q, "page": kv, "scale": 1.0, "softcap": None, "state": state, "first": True}
    for name, wrong in [
        ("q", normal(1, 3, 8, 16)[:, ::2]),
        ("page", kv[:, :, :, :8]),
        ("page", kv[:, :0]),
        ("page", kv.astype(np.float64)),
        ("state", empty(3, 4, 17)),
        ("state", empty(3, 8, 18)[:, ::2]),
        ("state", empty(2, 4, 18)),
        ("scratch", np.empty(16, np.uint8)),
    ]:
        with pytest.raises(ValueError, match=f"^{name}"):
            cpu.attend_page(**good | {name: wrong})
        if name == "state":
            with pytest.raises(ValueError, match="^state"):
                cpu.attention(q, kv, 0, None, 1.0, None, out, state=wrong)
