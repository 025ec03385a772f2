"""One text: its tokens, who chooses the next one, and where its keys and values are."""

from __future__ import annotations

from collections.abc import Sequence as Items

from flashrt.config import Sampling
from flashrt.engine.sampling import Sampler
from flashrt.kv.cache import KvCache


class Sequence:
    """`tokens` are those whose keys and values `kv` holds.

    A tree of tokens may be held behind them, until `commit` takes some of these in, or the next pass forgets them.
    """

    def __init__(self, kv: KvCache, sampler: Sampler | None = None, tokens: Items[int] = ()) -> None:
        self.kv, self.sampler = kv, sampler or Sampler(Sampling(), ())
        self.tokens = list(tokens)
        self._tree: list[tuple[int, int]] = []  # (token, parent)

    @property
    def length(self) -> int:
        """Tokens whose keys and values are held."""
        return self.kv.length

    def successor(self, sampler: Sampler) -> Sequence:
        """A sequence in the same memory that begins with what is there; this one is over."""
        return Sequence(self.kv, sampler, self.tokens)

    def extend(self, tokens: Items[int]) -> None:
        """Take in the tokens that a pass has computed."""
        self.kv.append(len(tokens))
        self.tokens.extend(tokens)

    def hold(self, tokens: Items[int], parents: Items[int]) -> None:
        """Remember a tree that a pass has computed."""
        self._tree = list(zip(tokens, parents, strict=True))

    def forget_tree(self) -> None:
        """Its keys and values are about to be overwritten."""
        self._tree = []

    def commit(self, path: Items[int]) -> None:
        """Take in tokens of the tree, by their indices: a path from its beginning, possibly an empty one.

        Raises ValueError for what is no such path, and when another pass or `rewind` has come between.
        """
        tree, before = self._tree, [-1, *path]
        known = all(0 <= node < len(tree) for node in path)
        if not known or any(tree[node][1] != parent for node, parent in zip(path, before, strict=False)):
            raise ValueError(f"{list(path)} is not a path through the tree of parents {[node[1] for node in tree]}")
        self._tree = []
        self.kv.commit(path)
        self.tokens.extend(tree[node][0] for node in path)

    def rewind(self, length: int) -> int:
        """Cut back to the first `length` tokens, or to fewer where their keys and values are gone; returns how many."""
        self._tree = []
        del self.tokens[length:]
        kept = self.kv.truncate(length)
        del self.tokens[kept:]
        return kept

    def settle(self) -> None:
        """Make all layers hold what `tokens` says, or less: a pass that was left half-way has moved some of them on."""
        self.rewind(self.length)

    def restored(self, tokens: Items[int], top: int, marks: Items[int] = ()) -> None:
        """Take in tokens whose keys and values the stores were given, of a sequence that has had `top`.

        marks: as in `KvCache.restored`
        """
        self.kv.restored(len(tokens), top, marks)
        self.tokens = list(tokens)

    def keep_shared(self, ids: Items[int]) -> int:
        """Cut back to what `ids` begin with, the last of them left out; returns how many tokens that are."""
        shared = 0
        for ours, theirs in zip(self.tokens[: self.length], ids[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        return self.rewind(shared)
