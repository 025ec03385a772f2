"""Multi-head latent attention: queries become latents, which attend to latents, and what comes of it, values."""

from __future__ import annotations

from flashrt.model.attention import AttentionBlocks
from flashrt.model.heads import Chosen
from flashrt.model.workspace import Tensor, Wide
from flashrt.spec import LatentAttention

ALL = slice(0, 1)  # of KV heads, of which there is one


class LatentBlocks(AttentionBlocks):
    """Computes the block of a layer that keeps latents, in passes of either kind in the absorbed form.

    Keys and values of the heads never exist: q · (W x) is (Wᵀ q) · x, and sums of W x are W of sums.
    """

    mixer = LatentAttention

    def mix(self, i: int, normed: Tensor, wide: Wide, chosen: Chosen | None) -> Tensor:
        assert chosen is None, "heads that share a latent are not left out"
        work, own, count = self.work, self._latent(i), len(normed)
        absorbed = work.view("absorbed", count, own.heads * own.head_dim).reshape(count, own.heads, own.head_dim)
        latents = work.view("latents", count, own.heads * own.rank)
        out = work.view("attended", count, own.width)
        query, key = self._rows(i, normed, wide)
        work.linear_by_head(f"{i}.k_b", query[:, :, : own.nope_dim], absorbed[:, :, : own.rank], wide)
        absorbed[:, :, own.rank :] = query[:, :, own.nope_dim :]
        for part, kv, rows in self.parts:
            store = kv.keys_of(i)
            store.append(key[part], None, rows.start)
            store.attend(absorbed[part], rows, ALL, latents[part])
        attended = latents.reshape(count, own.heads, own.rank)
        work.linear_by_head(f"{i}.v_b", attended, out.reshape(count, own.heads, own.value_dim), wide)
        return out

    def _rows(self, i: int, normed: Tensor, wide: Wide) -> tuple[Tensor, Tensor]:
        """Queries [T, heads, query_dim] and keys [T, 1, head_dim] of layer `i`, rotated; views of a buffer."""
        work, own, count = self.work, self._latent(i), len(normed)
        rows, by_way_of = work.view("qkv", count, own.row_width), normed
        width = own.heads * own.query_dim
        query, key, between = rows[:, :width], rows[:, width : width + own.head_dim], rows[:, width + own.head_dim :]
        if own.query_rank:
            work.linear(f"{i}.q_a", normed, between, wide)
            self._norm_latent(between, f"{i}.q_a_norm", own)
            by_way_of = between
        work.linear(f"{i}.q_b" if own.query_rank else f"{i}.queries", by_way_of, query, wide)
        work.linear(f"{i}.kv_a", normed, key, wide)
        self._norm_latent(key[:, : own.rank], f"{i}.kv_a_norm", own)
        query = query.reshape(count, own.heads, own.query_dim)
        key = key.reshape(count, 1, own.head_dim)
        self._rotate(own, query[:, :, own.nope_dim :])
        self._rotate(own, key[:, :, own.rank :])
        return query, key

    def _norm_latent(self, rows: Tensor, name: str, own: LatentAttention) -> None:
        """Normalise [T, n] in place."""
        self.ops.rms_norm(rows, self.work.weights.vector(name), own.latent_eps, rows)

    def _latent(self, i: int) -> LatentAttention:
        mixer = self.work.spec.layers[i].mixer
        assert isinstance(mixer, LatentAttention)
        return mixer
