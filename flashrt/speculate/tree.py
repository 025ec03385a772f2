"""What may follow a token: guesses in a tree, where those that begin alike share their beginning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ROOT = 0


class TokenTree:
    """Nodes 0, 1, .. in the order in which they were added, each with a token; parents come before their children.

    The root, node 0, is the last token that is certain, whose keys and values are yet to be computed. A pass over the
    tree computes the logits of what follows each node. `depths` says how far behind the root a node is.
    """

    def __init__(self, root: int) -> None:
        self.tokens = [root]
        self.parents = [-1]
        self.depths = [0]
        self._children: list[dict[int, int]] = [{}]  # of each node: token → node

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """The child of `parent` that carries `token`; made if there is none."""
        node = self._children[parent].setdefault(token, len(self))
        if node == len(self):
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1)
            self._children.append({})
        return node

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that carries `token`, if there is one."""
        return self._children[node].get(token)

    def children(self, node: int) -> list[int]:
        """In the order in which they were added."""
        return list(self._children[node].values())

    def find(self, tokens: Iterable[int]) -> int | None:
        """The node that is reached from the root through `tokens`, if there is one."""
        node: int | None = ROOT
        for token in tokens:
            if node is None:
                break
            node = self.child(node, token)
        return node

    def select(self, nodes: Sequence[int]) -> TokenTree:
        """The tree of `nodes` alone, ascending, the root first. Raises ValueError where a node's parent is missing."""
        if not nodes or nodes[0] != ROOT:
            raise ValueError("a tree begins with its root, node 0")
        tree, place = TokenTree(self.tokens[ROOT]), {ROOT: ROOT}
        for node in nodes[1:]:
            if self.parents[node] not in place:
                raise ValueError(f"node {node} is selected, but not its parent {self.parents[node]}")
            place[node] = tree.add(place[self.parents[node]], self.tokens[node])
        return tree
