"""Targets that concern all layers at once: one value recall for every layer, such that a density or perplexity is met.

Layers are measured on a grid of value recalls while they are fitted; between its points their thresholds, and what
those do, are interpolated. Perplexities are those of whole walks in which what the predictor leaves out is removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from converter.model import Model
from converter.predict_fit import GRID, Fit, LayerResult, Recipe, Sample, scores, selecting
from converter.predictors.copies import Copies
from converter.predictors.low_rank import LowRank
from converter.predictors.thresholds import Calibrated, bisect_target
from converter.states import write_file
from converter.walk import Block, Progress, losses, perplexity, walk
from flashsparse.pack.safetensors import Header, read_tensor
from flashsparse.sparsity.low_bit import LowBit
from flashsparse.sparsity.selection import select
from flashsparse.sparsity.spec import LayerSpec

EVALUATIONS = "evaluations.json"
MOST_NINES = 4.0  # the strictest value recall tried is 1 - 10 ** -4
LEAST_NINES = 0.3
JUMP = 0.15  # of the density between two points of a curve: a mass of equal scores, which no threshold divides
STEP_NINES = 0.015  # of the bisection: with both ends at most ten walks
Tensors = Mapping[str, Header]  # name -> the file that has it


def at_recall(result: LayerResult, recall: float) -> LayerSpec:
    """The layer's selection at a value recall, between the points of its curve; a layer computed whole stays that."""
    if not result.curve:
        return result.spec
    return selecting(result.spec, _between(result.curve, recall))


def _between(curve: Sequence[Calibrated], recall: float) -> Calibrated:
    above = min(int(np.searchsorted(GRID, recall)), len(GRID) - 1)
    below = max(above - 1, 0)
    width = GRID[above] - GRID[below]
    share = 1.0 if width == 0 else min(max((recall - GRID[below]) / width, 0.0), 1.0)
    if curve[above].density - curve[below].density > JUMP:
        return curve[above] if share == 1 else curve[below]

    def mean(name: str) -> float:
        low, high = getattr(curve[below], name), getattr(curve[above], name)
        return float(low + (high - low) * share)

    measured = {name: mean(name) for name in ("density", "recall", "value_recall", "precision")}
    threshold = None if curve[above].threshold is None else float(np.float32(mean("threshold")))
    k = None if curve[above].k is None else math.ceil(mean("k"))
    return Calibrated(threshold, k, **measured)


def meet_density_ratio(results: Sequence[LayerResult], ratio: float) -> list[LayerSpec]:
    """Every layer at the value recall with which the mean density is `ratio` times the mean true density.

    The nearest that is possible where the densities reach neither as low nor as high.
    """
    wanted = ratio * float(np.mean([result.true_density for result in results]))

    def density(recall: float) -> float:
        return float(np.mean([at_recall(result, recall).calibrated_density for result in results]))

    low, high = GRID[0], GRID[-1]
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if density(middle) < wanted else (low, middle)
    nearer = min((low, high), key=lambda recall: abs(density(recall) - wanted))
    return [at_recall(result, nearer) for result in results]


def meet_ppl_ratio(
    recipe: Recipe,
    results: Sequence[LayerResult],
    tensors: Tensors,
    model: Model,
    windows: Sequence[np.ndarray],
    work: Path,
    progress: Progress | None,
) -> list[LayerSpec]:
    """Every layer at the least value recall with which the perplexity of `windows` is within the ratio to dense.

    Walks that were finished are kept in `work`, and one that was stopped goes on. Raises ConvertError when even the
    strictest value recall exceeds the ratio.
    """
    assert recipe.options.target_value is not None
    walks = _Walks(recipe, results, tensors, model, windows, work, progress)
    dense = walks.perplexity(None)
    nines, _ = bisect_target(
        lambda nines: walks.perplexity(nines) / dense,
        recipe.options.target_value,
        LEAST_NINES,
        MOST_NINES,
        STEP_NINES,
    )
    return [at_recall(result, _recall(nines)) for result in results]


def _recall(nines: float) -> float:
    return 1 - 10**-nines


class _Walks:
    """Perplexities of the model with its predictor at some value recall, each measured once."""

    def __init__(
        self,
        recipe: Recipe,
        results: Sequence[LayerResult],
        tensors: Tensors,
        model: Model,
        windows: Sequence[np.ndarray],
        work: Path,
        progress: Progress | None,
    ) -> None:
        self.recipe, self.results, self.tensors = recipe, results, tensors
        self.model, self.windows, self.work, self.progress = model, windows, work, progress
        work.mkdir(exist_ok=True)
        file = work / EVALUATIONS
        self.found: dict[str, float] = json.loads(file.read_bytes()) if file.exists() else {}

    def perplexity(self, nines: float | None) -> float:
        """None: of the dense model."""
        name = "dense" if nines is None else repr(nines)
        if name not in self.found:
            self.found[name] = self._walk(name, None if nines is None else self._mask(nines))
            write_file(self.work / EVALUATIONS, json.dumps(self.found).encode())
        return self.found[name]

    def _walk(self, name: str, visit: Callable[[Block], np.ndarray] | None) -> float:
        def tell(what: str, done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"perplexity {len(self.found) + 1}, {what}", done, total)

        states = walk(self.model, self.windows, visit, work=self.work, resume=True, key=name, progress=tell)
        found = perplexity(losses(self.model, states, self.windows))
        states.remove()
        return found

    def _mask(self, nines: float) -> Callable[[Block], np.ndarray]:
        layers = [at_recall(result, _recall(nines)) for result in self.results]
        kept: dict[int, Fit] = {}

        def visit(block: Block) -> np.ndarray:
            spec = layers[block.layer]
            if spec.every:
                return np.ones(block.hidden.shape, bool)
            if block.layer not in kept:
                kept.clear()
                kept[block.layer] = read_fit(self.tensors, block.layer, spec, self.recipe.score)
            sample = Sample(block.x, block.gate, block.hidden, np.empty(0, bool))
            found = scores(self.recipe, kept[block.layer], sample)
            return select(found, self.recipe.options.selection, spec.threshold, spec.k)

        return visit


def read_fit(tensors: Tensors, layer: int, spec: LayerSpec, score: str) -> Fit:
    """A layer's predictor from its tensors, as the runtime will see it; None for the exact gate."""

    def read(name: str) -> np.ndarray | None:
        key = f"layers.{layer}.{name}"
        return read_tensor(tensors[key], key) if key in tensors else None

    def copy(name: str) -> LowBit | None:
        words, scales, biases = (read(f"{name}.{part}") for part in ("weight", "scales", "biases"))
        if words is None or scales is None or biases is None:
            return None
        assert spec.bits is not None and spec.group_size is not None
        return LowBit(words, scales, biases, spec.bits, spec.group_size)

    if score == "gate":
        return None
    if score == "low_rank":
        fc1, fc2 = (read(f"{name}.weight") for name in ("fc1", "fc2"))
        assert fc1 is not None and fc2 is not None
        return LowRank(fc1.astype(np.float32), fc2.astype(np.float32), read("fc2.bias"), spec.relu)
    gate = copy("gate")
    assert gate is not None
    return Copies(gate, read("gate.bias"), read("down_norm"), copy("up"), read("up.bias"))
