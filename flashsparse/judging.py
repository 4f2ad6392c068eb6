"""Judging a predictor: every neuron is computed, compared with what was predicted, and handed to an observer.

Owns what that needs beside the layer: the gate's activations where only records hold them, the norms of down columns,
arrays [T, I] of each layer and step. All of it is allocated only while judging and lies outside the memory budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from flashsparse.kernels import make_kernels
from flashsparse.pack.decode import vectors
from flashsparse.pack.layout import Field, Record
from flashsparse.pack.manifest import Activation, Manifest
from flashsparse.sparsity.judgement import LayerJudgement

if TYPE_CHECKING:
    from flashsparse.choice import Choice
    from flashsparse.kernels import Kernels

Observer = Callable[[LayerJudgement], None]


def gate_manifest(manifest: Manifest) -> Manifest:
    """A manifest whose kernels compute act(gate) of the same records as their hidden value, with the same bits."""
    fields = manifest.record.fields
    renamed = {"up": fields["gate"], "down": fields["down"]}
    if "gate_bias" in fields:
        renamed["up_bias"] = fields["gate_bias"]
    moved = {name: Field(name, field.offset, field.bytes, field.kind) for name, field in renamed.items()}
    activation = manifest.activation
    if activation.name == "drelu":
        activation = Activation("relu")
    record = Record(manifest.record.bytes, manifest.record.stride, moved)
    return replace(manifest, gated=False, activation=activation, record=record)


class Judging:
    """While an engine judges: what all its layers share. Close it, which stops its compute threads."""

    def __init__(self, manifest: Manifest, kernels: Kernels, threads: int, observer: Observer) -> None:
        self.manifest, self.kernels, self.observer = manifest, kernels, observer
        self.gates: Kernels | None = None
        if manifest.gated and "gate" in manifest.record.fields:
            self.gates = make_kernels(kernels.name, gate_manifest(manifest), threads)

    def begin(self, predicted: np.ndarray, masked: bool) -> Step:
        """Judge one evaluation of a layer. `masked`: the layer's result is made of the predicted neurons alone."""
        return Step(self, predicted, masked)

    def close(self) -> None:
        if self.gates is not None:
            self.gates.close()


class Step:
    """One evaluation of one layer: told of all its records, a tile at a time."""

    def __init__(self, judging: Judging, predicted: np.ndarray, masked: bool) -> None:
        self._judging, self._predicted, self._masked = judging, predicted, masked
        self._active = np.zeros(predicted.shape, bool)
        self._values = np.zeros(predicted.shape, np.float32)

    def compute(
        self,
        x: np.ndarray,
        truth: Choice,
        slab: np.ndarray,
        offsets: np.ndarray,
        ids: np.ndarray,
        cols: np.ndarray,
        hidden: np.ndarray,
    ) -> None:
        """Intermediate values of a tile's records into hidden [T, n], in the order of `cols`; notes what they are.

        `truth` is the layer's whole choice for x [T, d].
        """
        judging = self._judging
        if truth.activated is not None:
            active = truth.activated[:, ids] != 0
        elif judging.gates is not None:
            judging.gates.hidden(slab, offsets, ids, cols, x, None, None, hidden)
            active = hidden != 0
        judging.kernels.hidden(slab, offsets, ids, cols, x, truth.activated, None, hidden)
        if truth.activated is None and judging.gates is None:  # without a gate the hidden value is the activation
            active = hidden != 0
        self._active[:, ids] = active
        self._values[:, ids] = np.abs(hidden) * self._norms(slab, offsets)
        if self._masked:
            np.copyto(hidden, 0, where=~self._predicted[:, ids])

    def finish(self, layer: int) -> None:
        """Hand the judgement to the observer."""
        self._judging.observer(LayerJudgement(layer, self._predicted, self._active, self._values))

    def _norms(self, slab: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """float32 [n]: the norms of the down columns of a tile's records, which lie a multiple of the stride apart."""
        manifest = self._judging.manifest
        field, stride = manifest.record.fields["down"], manifest.record.stride
        rows = (offsets - offsets[0]) // stride
        shape = (int(rows[-1]) + 1, field.bytes)
        tile = np.ndarray(shape, np.uint8, slab.data, int(offsets[0]) + field.offset, (stride, 1))
        columns = vectors(manifest, field, tile[rows])
        return np.sqrt(np.einsum("ij,ij->i", columns, columns))
