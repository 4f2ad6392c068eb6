"""The order of a layer's records on flash, from which neurons fire together. Pure functions of the sampled sets.

Co-activation order is Ripple's greedy path (arXiv 2410.19274): neighbours on flash are what is active on the same
tokens, so that one request brings several. Hot neurons, which stay in their slots anyway, lie apart and leave no gaps
among the others.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Order = npt.NDArray[np.int32]  # [I]: record r of the layer is neuron order[r]

FRIENDS = 48  # of each neuron: the closest ones, which alone may become its neighbours while the path is built
HOT = 0.5  # neurons that are active on at least this share of the tokens lie first
BLOCK = 256  # neurons whose co-activation with all others is held at once


def frequency_order(active: npt.NDArray[np.bool_]) -> Order:
    """active [tokens, I] -> most often active first; ties: lower neuron first."""
    return np.argsort(-active.sum(axis=0), kind="stable").astype(np.int32)


def random_order(neurons: int, seed: int, layer: int) -> Order:
    """A control."""
    return np.random.default_rng([seed, layer]).permutation(neurons).astype(np.int32)


def coactivation_order(active: npt.NDArray[np.bool_]) -> Order:
    """active [tokens, I] -> hot neurons by frequency, then the others along Ripple's path."""
    counts = active.sum(axis=0)
    by_frequency = frequency_order(active)
    hot = by_frequency[counts[by_frequency] >= HOT * max(len(active), 1)]
    cold = np.setdiff1d(by_frequency, hot)
    path = cold[greedy_path(active[:, cold])]
    return np.concatenate([hot, path]).astype(np.int32)


def greedy_path(active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """A path through all columns of active [tokens, n] that links pairs by how often they are active together.

    Links the pair with the highest count whose ends are free and in different chains, until none is left (ties: lower
    numbers first); the chains that remain follow each other by the frequency of their most frequent neuron.
    """
    counts = active.sum(axis=0)
    chains = _Chains(active.shape[1])
    for first, second in _pairs(active):
        chains.link(int(first), int(second))
    found = chains.walk()
    found.sort(key=lambda chain: (-int(counts[chain].max()), min(chain)))
    return np.array([neuron for chain in found for neuron in chain], np.int64)


def _pairs(active: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """[m, 2]: pairs of columns among each other's FRIENDS closest, most often active together first."""
    sets = active.astype(np.float32)
    neurons = sets.shape[1]
    width = min(FRIENDS, neurons - 1)
    found = [np.empty((0, 3), np.int64)]
    for begin in range(0, neurons if width > 0 else 0, BLOCK):
        part = np.arange(begin, min(neurons, begin + BLOCK))
        together = (sets[:, part].T @ sets).astype(np.int64)  # whole numbers below 2^24: exact in any order of adding
        together[np.arange(len(part)), part] = -1
        # Distinct keys, so that the choice among equals is the same everywhere: the lower number.
        keys = together * neurons + np.arange(neurons - 1, -1, -1)
        friends = np.argpartition(-keys, width - 1, axis=1)[:, :width]
        count = np.take_along_axis(together, friends, 1)
        rows = np.repeat(part, width)
        found.append(np.stack([count.ravel(), np.minimum(rows, friends.ravel()), np.maximum(rows, friends.ravel())], 1))
    pairs = np.unique(np.concatenate(found), axis=0)
    pairs = pairs[pairs[:, 0] > 0]
    return pairs[np.lexsort((pairs[:, 2], pairs[:, 1], -pairs[:, 0]))][:, 1:]


class _Chains:
    """Neurons linked to at most two others each, without rings."""

    def __init__(self, neurons: int) -> None:
        self.links: list[list[int]] = [[] for _ in range(neurons)]
        self.parent = list(range(neurons))

    def link(self, a: int, b: int) -> None:
        """Unless one of them has two neighbours, or both are in one chain."""
        if len(self.links[a]) > 1 or len(self.links[b]) > 1 or self._root(a) == self._root(b):
            return
        self.links[a].append(b)
        self.links[b].append(a)
        self.parent[self._root(a)] = self._root(b)

    def _root(self, at: int) -> int:
        while self.parent[at] != at:
            self.parent[at] = at = self.parent[self.parent[at]]
        return at

    def walk(self) -> list[list[int]]:
        """Every chain, from its end with the lower number."""
        seen = [False] * len(self.links)
        chains = []
        for start, neighbours in enumerate(self.links):
            if seen[start] or len(neighbours) > 1:
                continue
            chain, at = [], start
            while at >= 0:
                seen[at] = True
                chain.append(at)
                at = next((n for n in self.links[at] if not seen[n]), -1)
            chains.append(chain)
        return chains
