import numpy as np
import pytest
import torch

from .helpers import cpu, empty, normal, reference, rms_ratio, same, tensor

TAPS, DIM, VALUES, KEY_HEADS, HEADS = 4, 13, 21, 2, 6
CHANNELS = 2 * KEY_HEADS * DIM + HEADS * VALUES
PARENTS = [-1, 0, 0, -1, 3, 1, 4, 6, 4]


class Net:
    """Rows of a gated delta net, and the state before them."""

    def __init__(self, rows, tiled=False, seed=1):
        self.x, self.gates = normal(seed, rows, CHANNELS), normal(seed + 1, rows, 2 * HEADS)
        self.taps, self.bias = normal(seed + 2, TAPS, CHANNELS), normal(seed + 3, HEADS)
        self.rate = -np.exp(normal(seed + 4, HEADS) / 4)
        self.state, self.tail = normal(seed + 5, HEADS, DIM, VALUES), normal(seed + 6, TAPS - 1, CHANNELS)
        self.tiled = tiled

    def run(self, ops, rows, advance, parents=None, wanted=None, state=None):
        """Outputs of the rows, then state and tail behind them."""
        before = (self.state, self.tail) if state is None else state
        arrays = [self.x[rows], self.gates[rows], self.taps, self.rate, self.bias, *before]
        arrays = [np.ascontiguousarray(each).copy() for each in arrays]
        parents = None if parents is None else np.array(parents, np.int32)
        out = empty(len(arrays[0]) if wanted is None else wanted, HEADS * VALUES)
        if ops is cpu:
            x, gates, taps, rate, bias, state, tail = arrays
            cpu.delta_rule(x, gates, taps, rate, bias, self.tiled, state, tail, out, advance, parents)
            return out, state, tail
        x, gates, taps, rate, bias, state, tail = (torch.from_numpy(each) for each in arrays)
        found = torch.from_numpy(out)
        reference.delta_rule(x, gates, taps, rate, bias, self.tiled, state, tail, found, advance, tensor(parents))
        return out, state.numpy(), tail.numpy()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("rows", "advance", "parents"), [(1, 1, None), (5, 2, None), (11, 2, PARENTS), (71, 71, None)])
def test_delta_rule(isa, rows, advance, parents, tiled):
    net = Net(rows, tiled)
    for found, expected in zip(
        net.run(cpu, slice(rows), advance, parents), net.run(reference, slice(rows), advance, parents), strict=True
    ):
        assert rms_ratio(found, torch.from_numpy(expected)) < 2e-6


@pytest.mark.parametrize("step", [1, 3, 16, 64])
def test_rows_cut_into_calls_give_the_same_bits(isa, step):
    net = Net(71)
    whole = net.run(cpu, slice(71), 71)
    state, outs = (net.state, net.tail), []
    for begin in range(0, 71, step):
        rows = slice(begin, min(begin + step, 71))
        out, *state = net.run(cpu, rows, rows.stop - begin, state=state)
        outs.append(out)
    for found, expected in zip((np.concatenate(outs), *state), whole, strict=True):
        assert same(found, expected)


def test_rows_that_do_not_advance_leave_no_trace(isa):
    net = Net(11)
    out, state, tail = net.run(cpu, slice(11), 0)
    assert same(state, net.state)
    assert same(tail, net.tail)
    assert same(out, net.run(cpu, slice(11), 11)[0])
    some, *rest = net.run(cpu, slice(11), 4, wanted=3)
    assert same(some, out[8:])
    for found, expected in zip(rest, net.run(cpu, slice(4), 4)[1:], strict=True):
        assert same(found, expected)


def test_a_row_of_a_tree_has_the_bits_of_its_path(isa):
    net = Net(11)
    out, *_ = net.run(cpu, slice(11), 2, PARENTS)
    for node in range(len(PARENTS)):
        path, at = [], node
        while at >= 0:
            path.insert(0, 2 + at)
            at = PARENTS[at]
        alone, *_ = net.run(cpu, [0, 1, *path], 2 + len(path))
        assert same(alone[-1:], out[2 + node : 3 + node])


def test_threads_do_not_change_bits():
    net = Net(40)
    expected = net.run(cpu, slice(40), 40)
    cpu.set_threads(1)
    for found, other in zip(net.run(cpu, slice(40), 40), expected, strict=True):
        assert same(found, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advance": 12}, "advance: expected 0 to 11, found 12"),
        ({"parents": [-1] * 9 + [10]}, "parents: expected -1 or a row before row 9, found 10"),
        ({"rows": slice(0, 11), "wanted": 12}, "out: more rows than x has"),
        ({"rows": np.arange(20) % 11, "advance": 3}, "advance: at most 16 rows may lie behind it, found 17"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    options = {"rows": slice(11), "advance": 1, **change}
    with pytest.raises(ValueError, match=message):
        Net(11).run(cpu, options.pop("rows"), **options)


def test_channels_that_are_not_those_of_the_heads_are_refused():
    net = Net(3)
    with pytest.raises(ValueError, match="x: 177 channels are not those of 6 heads"):
        cpu.delta_rule(net.x[:, :-1], net.gates, net.taps, net.rate, net.bias, False, net.state, net.tail,
                       empty(3, HEADS * VALUES), 3)  # fmt: skip


@pytest.mark.parametrize(("n", "k"), [(1, 48), (3, 63), (123, 128)])
def test_gates(isa, n, k):
    x, gate, weight = normal(1, n, k), normal(2, n, 2 * k)[:, k:], normal(3, k)
    out, expected = empty(n, k), torch.empty(n, k)
    cpu.rms_norm_gated(x, gate, weight, 1e-6, out)
    reference.rms_norm_gated(*map(torch.from_numpy, (x, gate, weight)), 1e-6, expected)
    assert rms_ratio(out, expected) < 1e-6
    expected = torch.from_numpy(x.copy())
    reference.sigmoid_gate(expected, torch.from_numpy(gate))
    cpu.sigmoid_gate(x, gate)
    assert rms_ratio(x, expected) < 1e-6
