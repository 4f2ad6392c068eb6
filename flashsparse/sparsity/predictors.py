"""Predictors at run time: from a layer's input to a score for each neuron, computed by the kernels.

Owns the formulas of the scores (docs/format.md states them). What a score means for a neuron is the selection's; how
predictors are fitted is the converter's. Scores of a token do not depend on the tokens computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from flashsparse.kernels import Kernels
    from flashsparse.pack.manifest import Manifest
    from flashsparse.weights import ResidentStore, Weight


class Predictor(Protocol):
    """T tokens, d hidden size, I neurons."""

    def score(self, x: np.ndarray, out: np.ndarray) -> None:
        """out [T, I] = the float32 scores of x [T, d]: the higher, the more important."""


@dataclass
class GateCopy:
    """The gate's pre-activation by a low-bit copy of it; `magnitude`: |act| of it, for activations without zeros."""

    kernels: Kernels
    gate: Weight
    bias: np.ndarray | None
    magnitude: bool

    def score(self, x: np.ndarray, out: np.ndarray) -> None:
        self.kernels.score(self.gate, self.bias, x, out)
        if self.magnitude:
            self.kernels.activate(out)
            np.abs(out, out=out)


@dataclass
class GateUpCopy:
    """The value |act(gate)| |up| norm by low-bit copies of both; without `up` (models without a gate) |act| norm.

    `norms` [I] are those of the down columns. `rectified`: DReLU, whose up half is a ReLU too. `lifted` [chunk, I] is
    scratch for the up products.
    """

    kernels: Kernels
    gate: Weight
    gate_bias: np.ndarray | None
    up: Weight | None
    up_bias: np.ndarray | None
    norms: np.ndarray
    rectified: bool
    lifted: np.ndarray | None

    def score(self, x: np.ndarray, out: np.ndarray) -> None:
        self.kernels.score(self.gate, self.gate_bias, x, out)
        self.kernels.activate(out)
        np.abs(out, out=out)
        with np.errstate(all="ignore"):  # scores that are no numbers select their neurons, and show in the output
            if self.up is not None and self.lifted is not None:
                lifted = self.lifted[: len(x)]
                self.kernels.score(self.up, self.up_bias, x, lifted)
                if self.rectified:
                    np.maximum(lifted, 0, out=lifted)
                out *= np.abs(lifted, out=lifted)
            out *= self.norms


@dataclass
class LowRank:
    """fc2 (fc1 x) + bias, with a ReLU between when `relu`. `middle` is flat scratch for the rank's values."""

    kernels: Kernels
    fc1: Weight
    fc2: Weight
    bias: np.ndarray | None
    relu: bool
    middle: np.ndarray

    def score(self, x: np.ndarray, out: np.ndarray) -> None:
        middle = self.middle[: len(x) * self.fc1.rows].reshape(len(x), self.fc1.rows)
        self.kernels.linear(self.fc1, None, x, middle)
        if self.relu:
            np.maximum(middle, 0, out=middle)
        self.kernels.linear(self.fc2, self.bias, middle, out)


@dataclass
class ExactGate:
    """The resident gate itself. After `score`, `activated` [:T] holds the exact activations of the same tokens."""

    kernels: Kernels
    gate: Weight
    bias: np.ndarray | None
    magnitude: bool
    activated: np.ndarray

    def score(self, x: np.ndarray, out: np.ndarray) -> None:
        activated = self.activated[: len(x)]
        self.kernels.linear(self.gate, self.bias, x, activated)
        if not self.magnitude:
            out[:] = activated
        self.kernels.activate(activated)
        if self.magnitude:
            np.abs(activated, out=out)


@dataclass(frozen=True)
class ScratchSizes:
    """Scratch that the predictors of a pack share, per token: `wide` arrays of I floats, `middle` floats of factors."""

    wide: int = 0
    middle: int = 0


def scratch_sizes(manifest: Manifest) -> ScratchSizes:
    """What scoring needs beside the scores themselves."""
    spec = manifest.predictor
    if spec is None:
        return ScratchSizes()
    wide = spec.score == "gate" or (spec.score == "gate_up_copy" and manifest.gated)
    return ScratchSizes(int(wide), max(layer.rank or 0 for layer in spec.layers))


def make_predictor(
    manifest: Manifest, layer: int, kernels: Kernels, store: ResidentStore, wide: np.ndarray | None, middle: np.ndarray
) -> Predictor | None:
    """The predictor of a layer from the tensors of the predictor file; None for one that is computed whole.

    wide [chunk, I] and middle (flat) are scratch of `scratch_sizes`. The exact gate has no tensors here: `ExactGate`.
    """
    assert manifest.predictor is not None
    score, spec = manifest.predictor.score, manifest.predictor.layers[layer]
    if spec.every:
        return None
    base, name = f"layers.{layer}", manifest.activation.name
    if score == "low_rank":
        fc1, fc2 = store.weight(f"{base}.fc1"), store.weight(f"{base}.fc2")
        return LowRank(kernels, fc1, fc2, _vector(store, f"{base}.fc2.bias"), spec.relu, middle)
    gate, gate_bias = store.weight(f"{base}.gate"), _vector(store, f"{base}.gate.bias")
    if score == "gate_copy":
        return GateCopy(kernels, gate, gate_bias, magnitude=name == "silu")
    up = store.weight(f"{base}.up") if manifest.gated else None
    up_bias, norms = _vector(store, f"{base}.up.bias"), store.tensor(f"{base}.down_norm")
    return GateUpCopy(kernels, gate, gate_bias, up, up_bias, norms, name == "drelu", wide)


def _vector(store: ResidentStore, name: str) -> np.ndarray | None:
    """A float32 tensor in place, or None when the file has none of that name."""
    return store.tensor(name) if name in store else None
