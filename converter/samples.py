"""Activations of some tokens of a text, per layer on disk: what thresholds are found on.

Owns which tokens are kept and how; at most SAMPLE_TOKENS tokens, 4 bytes per token and neuron and quantity: for 1,024
tokens of a layer of 11,008 neurons 45 MB. Sums over layers are on disk, one layer's are in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from converter.model import LayerWeights, Model
from converter.walk import Block
from flashsparse.sparsity.activations import activate
from flashsparse.sparsity.metrics import Cett, Searched, active

SAMPLE_TOKENS = 1024


class Samples:
    """`add` is a visitor of a walk over `windows`; afterwards the samples of every layer can be read.

    quantities: "gate" keeps |act(g)|, sorted, without its tokens; "hidden" keeps h [n, I].
    """

    def __init__(
        self, model: Model, windows: Sequence[np.ndarray], quantities: Collection[str], tokens: int, work: Path
    ) -> None:
        self._model, self._quantities, self._work = model, frozenset(quantities), work
        self._starts = np.concatenate([[0], np.cumsum([len(w) for w in windows])])
        total = int(self._starts[-1])
        self._chosen = np.unique(np.linspace(0, total - 1, min(tokens, total)).round().astype(np.int64))
        self._rows: dict[str, np.ndarray] = {}
        self._norms: dict[int, np.ndarray] = {}
        self._searched: dict[int, Searched] = {}

    @property
    def tokens(self) -> int:
        """How many tokens are kept per layer."""
        return len(self._chosen)

    def add(self, block: Block) -> None:
        """Keeps the chosen tokens of a block; blocks come in order, layer by layer."""
        begin = int(self._starts[block.window]) + block.start
        first, end = np.searchsorted(self._chosen, [begin, begin + len(block.x)])
        rows = self._chosen[first:end] - begin
        for quantity in self._quantities:
            kept = self._rows.setdefault(quantity, np.empty((self.tokens, self._model.intermediate_size), np.float32))
            kept[first:end] = self._values(quantity, block, rows)
        if len(rows) and end == self.tokens:
            self._save(block.layer)

    def _values(self, quantity: str, block: Block, rows: np.ndarray) -> np.ndarray:
        if quantity == "hidden":
            return block.hidden[rows]
        activation = self._model.activation
        return np.abs(activate(activation.name, activation.param, block.gate[rows]))

    def _save(self, layer: int) -> None:
        for quantity, values in self._rows.items():
            if quantity == "gate":
                values = np.sort(values, axis=None)
            with open(self._path(quantity, layer), "wb") as file:  # numpy's own writing tells of no full disk
                file.write(values.data)

    def _path(self, quantity: str, layer: int) -> Path:
        return self._work / f"{quantity}-{layer}.f32"

    def _load(self, quantity: str, layer: int) -> np.ndarray:
        return np.fromfile(self._path(quantity, layer), np.float32)

    def gate(self, layer: int) -> np.ndarray:
        """|act(g)| of the layer's neurons and tokens, ascending [n * I]."""
        return self._load("gate", layer)

    def hidden(self, layer: int) -> np.ndarray:
        """h of the layer [n, I]."""
        return self._load("hidden", layer).reshape(-1, self._model.intermediate_size)

    def largest(self, layer: int) -> float:
        """The largest |act(g)| of the layer."""
        return float(self.gate(layer)[-1])

    def cett(self, layer: int, weights: LayerWeights) -> Cett:
        """CETT of the layer on the sample. What searches learn is kept from one call to the next."""
        cett = Cett(self.hidden(layer), weights.down, weights.down_norms, self._searched.get(layer))
        self._searched[layer], self._norms[layer] = cett.searched, weights.down_norms
        return cett

    def between(self, quantity: str, layer: int, low: float, high: float) -> float:
        """Share of the layer's neurons and tokens that are active at threshold `low` and not at `high`."""
        if quantity == "gate":
            ascending = self.gate(layer)
            zeros = np.searchsorted(ascending, np.float32(0), side="right")
            ends = np.maximum(zeros, np.searchsorted(ascending, np.array([low, high], np.float32)))
            return float(ends[1] - ends[0]) / ascending.size
        values = np.abs(self.hidden(layer))
        if quantity == "value":
            values *= self._norms[layer]
        return float(active(values, low).mean() - active(values, high).mean())
