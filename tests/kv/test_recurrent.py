"""States of a recurrent layer: whatever passes come, and wherever a sequence is cut back, they are of its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.kv.base import Kernels, KvLimits, KvRows
from flashrt.kv.cache import KvCache, kv_bytes
from flashrt.kv.marks import MARKS, STEP, Marks, prompt_mark
from flashrt.kv.pages import PAGE_BYTES, Extent, StatePage, pages
from flashrt.kv.recurrent import KEPT_ROWS, RecurrentStore
from flashrt.spec import Attention, DeltaNet, Ffn, Layer, ModelSpec
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec

NET = DeltaNet(key_heads=1, heads=2, key_dim=3, value_dim=5)
LIMITS, KERNELS = KvLimits(1 << 20, 512), Kernels(ops.load("cpu"), None)
PRIME = 4093  # products of smaller numbers and 31 are exact in float32


def hashed(tokens, state=1):
    """What a state is after tokens, which depends on each of them and on their order."""
    for token in tokens:
        state = (31 * state + token) % PRIME
    return state


def step(rows, state, out, advance, parents=None):
    """In place of a delta net: a state's numbers are the hash of what it took in, and so is the output of a row."""
    assert len(rows) - advance <= 16
    before = int(state[0])
    after, wanted = [], len(rows) - len(out)
    for i, row in enumerate(rows):
        follows = i - 1
        if i >= advance and parents is not None:
            parent = int(parents[i - advance])
            follows = advance - 1 if parent < 0 else advance + parent
        after.append(hashed([int(row[0])], after[follows] if follows >= 0 else before))
        if i >= wanted:
            out[i - wanted] = after[-1]
    if advance:
        state[:] = after[advance - 1]
    rows[:] = np.nan  # used up


class Text:
    """A sequence of one recurrent layer, beside the tokens that it should have taken in."""

    def __init__(self):
        self.store = RecurrentStore(NET, LIMITS, KERNELS, np.zeros)
        self.store.restart()
        self.store._states[-1] = 1  # the hash of nothing
        self.kv, self.tokens = KvCache([self.store], 1 << 20), []
        self.step = step
        self.spare = np.zeros((KEPT_ROWS, NET.row_width), np.float32)

    def compute(self, tokens, parents=None, wide=False, ahead=0, draft=False):
        """Outputs of rows behind the sequence."""
        inputs, out = np.zeros((len(tokens), NET.row_width), np.float32), np.zeros((len(tokens), NET.width), np.float32)
        inputs[:, 0] = tokens
        parents = None if parents is None else np.array(parents, np.int32)
        rows = KvRows(self.kv.length + ahead, parents, wide, draft)
        self.store.mix(inputs, rows, self.step, self.spare, out)
        return [int(row[0]) for row in out]

    def extend(self, tokens, wide=False):
        found = self.compute(tokens, wide=wide)
        self.kv.append(len(tokens))
        assert found == [hashed([*self.tokens, *tokens[: i + 1]]) for i in range(len(tokens))]
        self.tokens += tokens

    def prompt(self, tokens, chunk):
        """As `Runner.prefill` computes what is new."""
        self.kv.mark(prompt_mark(len(tokens)))
        new = tokens[self.kv.length :]
        for begin in range(0, len(new), chunk):
            self.extend(new[begin : begin + chunk], wide=len(new) > 16)

    def cut(self, length):
        kept = self.kv.truncate(length)
        if kept == 0:
            self.store._states[-1] = 1
        del self.tokens[kept:]
        return kept

    def state(self, position):
        out = np.empty(NET.state_size, np.float32)
        self.store.read_state(position, slice(0, len(out)), out)
        return int(out[0])


def tokens_of(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, count).tolist()


@pytest.mark.parametrize("chunk", [16, 64, 512])
def test_a_prompt_can_be_cut_back_to_its_marks_however_it_was_computed(chunk):
    tokens = tokens_of(2500)
    text = Text()
    text.prompt(tokens, chunk)
    assert text.kv.marks() == (2048, 2483)
    for position in (2048, 2483, 2500):
        assert text.state(position) == hashed(tokens[:position])
    for length, expected in ((2500, 2500), (2499, 2483), (2483, 2483), (2482, 2048), (2047, 0)):
        assert text.kv.reach(length, 2500) == expected
    assert text.cut(2490) == 2483
    text.extend(tokens_of(9, 1))
    assert text.cut(2480) == 2048
    text.extend(tokens_of(40, 2), wide=True)
    assert text.kv.marks() == (2048,)
    assert text.cut(2000) == 0
    text.extend(tokens_of(40, 3), wide=True)


def test_the_last_two_prompts_and_the_last_multiple_are_marked():
    text = Text()
    for count in (100, 300, 900):
        text.prompt(text.tokens + tokens_of(count - len(text.tokens), count), 64)
        for token in tokens_of(20, count + 1):
            text.extend([token])
    assert text.kv.marks() == (283, 883)
    for _ in range(200):
        text.extend([5])
    assert text.kv.marks() == (283, 883, 1024)
    for position in (283, 883, 1024, len(text.tokens)):
        assert text.state(position) == hashed(text.tokens[:position])


@pytest.mark.parametrize("size", [1, 3, 16])
def test_marks_do_not_depend_on_how_many_drafts_stood(size):
    """Where a text is decoded, drafts decide how many tokens a pass brings."""
    text, tokens = Text(), tokens_of(STEP + 200)
    text.prompt(tokens[:990], 64)
    while len(text.tokens) < len(tokens):
        text.extend(tokens[len(text.tokens) : len(text.tokens) + size])
        expected = {973} | ({STEP} if len(text.tokens) >= STEP else set())
        assert set(text.kv.marks()) == expected
        for length in (len(text.tokens) - 1, len(text.tokens) - 7):
            assert text.kv.reach(length, 5000) == max(mark for mark in expected | {0} if mark <= length)
    assert text.cut(STEP + 3) == STEP
    text.extend([9, 8])


def test_trees_drafts_and_what_is_kept_of_them():
    text, random = Text(), np.random.default_rng(3)
    text.prompt(tokens_of(40), 16)
    for _ in range(60):
        count = int(random.integers(1, 17))
        parents = [int(random.integers(-1, i)) if i else -1 for i in range(count)]
        nodes = random.integers(0, 1000, count).tolist()
        if random.integers(2):  # drafts of resident neurons come first, one by one
            for i in range(min(count, 5)):
                drafted = text.compute([nodes[i]], ahead=i, draft=True)
                assert drafted == [hashed(text.tokens + nodes[: i + 1])]
        paths = []
        for i, parent in enumerate(parents):
            paths.append([*(paths[parent] if parent >= 0 else []), i])
        found = text.compute(nodes, parents)
        assert found == [hashed(text.tokens + [nodes[i] for i in path]) for path in paths]
        if random.integers(4):  # else another pass forgets the tree
            path = paths[int(random.integers(count))]
            text.kv.commit(path)
            text.tokens += [nodes[i] for i in path]
    assert text.state(text.kv.length) == hashed(text.tokens)


def test_rows_that_do_not_follow_are_refused():
    text = Text()
    text.prompt(tokens_of(40), 16)
    text.compute(tokens_of(20, 1), wide=True)  # and a failure before they became part of the sequence
    with pytest.raises(ValueError, match="rows from 40 on do not follow a state after 60 tokens"):
        text.compute([1])
    for start, count, wide in ((61, 20, True), (61, 17, False), (70, 23, False), (77, 1, False)):
        rows = KvRows(start, wide=wide)
        with pytest.raises(ValueError, match=f"rows from {start} on do not follow a state after 60 tokens"):
            text.store.mix(np.zeros((count, NET.row_width), np.float32), rows, text.step, text.spare, None)
    assert text.cut(40) == 23
    text.extend(tokens_of(17, 2), wide=True)


@pytest.mark.parametrize("after", range(3))
def test_an_interrupt_leaves_marks_or_nothing(after):
    """While a state moves on it cannot be gone on from; the marks can."""
    text, calls = Text(), []
    text.prompt(tokens_of(40), 16)
    text.extend([1, 2, 3])

    def interrupted(rows, state, out, advance, parents=None):
        calls.append(advance)
        step(rows, state, out, advance, parents)
        if len(calls) > after:
            raise KeyboardInterrupt

    text.step = interrupted
    for token in range(after):
        text.extend([token])
    with pytest.raises(KeyboardInterrupt):
        text.extend([7])
    text.step = step
    length = text.kv.length
    assert text.cut(length) in (23, length)
    text.extend(tokens_of(20, 5), wide=True)


def test_states_come_back_as_they_were():
    text = Text()
    text.prompt(tokens_of(2500), 64)
    text.extend([4, 5, 6])
    marks, length = text.kv.marks(), text.kv.length
    other = Text()
    other.kv.restart([length])
    for page in pages([NET], Extent(0, length, length, marks, ends=True), KvCodec.BF16):
        values = np.empty(page.shape, np.float32)
        text.store.read_state(page.position, page.part, values)
        other.store.write_state(page.position, page.part, values)
    other.kv.restored(length, length, marks)
    other.tokens = list(text.tokens)
    assert other.kv.marks() == marks
    for position in (*marks, length):
        assert other.state(position) == text.state(position)
    for each in (text, other):
        assert each.cut(2490) == 2483
        each.extend(tokens_of(30, 7), wide=True)
    back = Text()  # to a mark, which stays one
    back.kv.restart([2483])
    for page in pages([NET], Extent(0, 2483, length, (2048, 2483), ends=True), KvCodec.BF16):
        values = np.empty(page.shape, np.float32)
        text.store.read_state(page.position, page.part, values)
        back.store.write_state(page.position, page.part, values)
    back.kv.restored(2483, length, (2048, 2483))
    back.tokens = text.tokens[:2483]
    assert back.kv.marks() == (2048, 2483)
    back.extend([1, 2])
    assert back.cut(2484) == 2483
    assert back.cut(2400) == 2048


def test_pages_of_states_stand_behind_the_segment_that_they_end_in():
    net = DeltaNet(key_heads=2, heads=5, key_dim=100, value_dim=128)
    mixers = [net, Attention(2, 1, 8, 1.0), net]
    found = list(pages(mixers, Extent(256, 1000, 1000, (200, 300, 512, 983), ends=True), KvCodec.BF16))
    states = [page for page in found if isinstance(page, StatePage)]
    assert sorted({page.position for page in states}) == [300, 512, 983, 1000]
    for position in (300, 512, 983, 1000):
        for layer in (0, 2):
            parts = [page.part for page in states if (page.position, page.layer) == (position, layer)]
            assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
            assert parts[-1].stop == net.state_size
    assert all(4 * page.items <= PAGE_BYTES for page in states)
    first = [page.begin for page in found if not isinstance(page, StatePage)]
    order = [page.position if isinstance(page, StatePage) else page.begin + 1 for page in found]
    assert order == sorted(order)
    assert first == [256, 512, 768]
    assert not [page for page in pages(mixers, Extent(0, 100, 100), KvCodec.BF16) if isinstance(page, StatePage)]


def test_marks_are_chosen_by_lengths_alone():
    assert [prompt_mark(length) for length in (17, 18, 40, STEP + 17, STEP + 18)] == [-1, 1, 23, STEP - 1, STEP + 1]
    marks = Marks()
    assert marks.next(0, STEP - 1) is None
    assert marks.next(STEP - 1, STEP) == STEP
    assert marks.next(STEP, 3 * STEP) == 2 * STEP
    marks.wanted = 1500
    assert marks.next(STEP, 3 * STEP) == 1500
    assert marks.next(1500, 3 * STEP) == 2 * STEP


@pytest.mark.parametrize("context", [100, 100_000])
def test_what_a_state_takes_does_not_depend_on_the_context(context):
    layers = (Layer(NET, Ffn(8, "silu")), Layer(Attention(2, 1, 8, 1.0), Ffn(8, "silu")))
    spec = ModelSpec("any", 10, 16, layers, 1 << 17)
    states = 4 * ((MARKS + 1) * NET.state_size + KEPT_ROWS * NET.row_width)
    assert kv_bytes(spec, KvLimits(context, 64)) == 2 * 2 * 8 * context + states
    taken = []

    def allocate(shape, dtype):
        taken.append(np.zeros(shape, dtype))
        return taken[-1]

    RecurrentStore(NET, LIMITS, KERNELS, allocate)
    assert sum(memory.nbytes for memory in taken) == states
