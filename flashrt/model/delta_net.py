"""Gated delta nets: projections, the recurrence over the rows of a sequence, and the gated norm of what heads give."""

from __future__ import annotations

from functools import partial

from flashrt.kv.recurrent import KEPT_ROWS
from flashrt.model.heads import Chosen
from flashrt.model.mixer import MixerBlocks
from flashrt.model.workspace import Tensor, Wide
from flashrt.spec import DeltaNet


class DeltaNetBlocks(MixerBlocks):
    """Computes the block of a recurrent layer; states are kept with their sequences."""

    mixer = DeltaNet

    def mix(self, i: int, normed: Tensor, wide: Wide, chosen: Chosen | None) -> Tensor:
        assert chosen is None, "heads of a delta net are not left out"
        work, net, count = self.work, self._net(i), len(normed)
        rows, gate = work.view("qkv", count, net.row_width), work.view("gate", count, net.width)
        work.linear(f"{i}.qkv", normed, rows, wide)
        work.linear(f"{i}.gate", normed, gate, wide)
        work.linear(f"{i}.beta", normed, rows[:, net.channels :], wide)
        work.linear(f"{i}.decay", normed, rows[:, net.channels + net.heads :], wide)
        out, spare = work.view("attended", count, net.width), work.view("rows", KEPT_ROWS, net.row_width)
        for own, kv, place in self.parts:
            kv.recurrent[i].mix(rows[own], place, partial(self._step, i), spare, out[own])
        heads, gates = (each.reshape(count * net.heads, net.value_dim) for each in (out, gate))
        self.ops.rms_norm_gated(heads, gates, work.weights.vector(f"{i}.head_norm"), work.spec.norm_eps, heads)
        return out

    def _net(self, i: int) -> DeltaNet:
        net = self.work.spec.layers[i].mixer
        assert isinstance(net, DeltaNet)
        return net

    def _step(
        self, i: int, rows: Tensor, state: Tensor, out: Tensor, advance: int, parents: Tensor | None = None
    ) -> None:
        """See `kv.recurrent.Step`."""
        net, vector = self._net(i), self.work.weights.vector
        x, gates = rows[:, : net.channels], rows[:, net.channels :]
        taps = vector(f"{i}.taps").reshape(net.taps, net.channels)
        size = net.heads * net.key_dim * net.value_dim
        matrix = state[:size].reshape(net.heads, net.key_dim, net.value_dim)
        tail = state[size:].reshape(net.taps - 1, net.channels)
        rate, bias = vector(f"{i}.decay.rate"), vector(f"{i}.decay.bias")
        scratch = self.work.scratch
        self.ops.delta_rule(x, gates, taps, rate, bias, net.tiled, matrix, tail, out, advance, parents, scratch)
