"""Sparsity of a whole model: what thresholds cost in perplexity, and the search for thresholds that cost a given share.

Owns the measuring over walks; the formulas for one layer are in `flashsparse.sparsity.metrics`, the samples they need
in `converter.samples`. As published, a layer's thresholds are found on the dense model's activations and then applied
in all layers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from converter.disk import FULL_ERRNOS
from converter.model import LayerWeights, Model
from converter.samples import SAMPLE_TOKENS, Samples
from converter.walk import Block, Progress, losses, walk
from flashsparse.errors import ConvertError, NumericError, UsageError
from flashsparse.sparsity.activations import activate, has_zeros
from flashsparse.sparsity.metrics import (
    EVERYTHING,
    METRICS,
    active,
    cats_threshold,
    dead_neurons,
    fat_threshold,
    magnitude,
    teal_threshold,
    top_k_threshold,
)
from flashsparse.sparsity.thresholds_file import ModelShape

TOLERANCE = 1e-6  # of the bisection, in the setting that is searched
SAME = 1e-4  # ends of a bisection whose sets differ by less than this share of the neurons are the same
WALK = 10_000  # parts of a walk that progress counts
IN_MEMORY = 256 << 20  # bytes of residual states that a walk keeps in memory
Windows = Sequence[np.ndarray]
Find = Callable[[int, LayerWeights], float]  # a layer's threshold, from its number and its weights


@dataclass(frozen=True)
class Point:
    """A metric at one setting, measured on the model.

    `setting` is what thresholds follow from: the fraction kept (topk), epsilon (fat), the share skipped (cats, teal),
    or the CETT target (pplp). `thresholds` and `layers` (activation ratios, means over tokens) are per layer, `dead`
    counts neurons active in less than 0.1 % of the tokens, `ppl_ratio` is exp(loss sparse - loss dense).
    """

    metric: str
    setting: float
    thresholds: tuple[float, ...]
    layers: tuple[float, ...]
    dead: tuple[int, ...]
    ppl_ratio: float

    @property
    def activation_ratio(self) -> float:
        return float(np.mean(self.layers))


def model_shape(model: Model) -> ModelShape:
    """What a thresholds file says about the model."""
    source = str(model.config["source_model_type"])
    return ModelShape(source, model.hidden_size, model.intermediate_size, model.layers, model.activation.name)


def check_setting(metric: str, setting: float, activation: str) -> None:
    """Raises UsageError for a setting outside the metric's range, or one that means nothing for the activation."""
    expected = {"topk": "above 0, at most 1", "fat": "0 or more", "pplp": "above 0"}.get(metric, "0 or more, below 1")
    good = {"topk": 0 < setting <= 1, "fat": setting >= 0, "pplp": setting > 0}.get(metric, 0 <= setting < 1)
    if not good or not math.isfinite(setting):
        raise UsageError(f"{metric}: found {setting:g}, expected a number {expected}")
    if metric == "fat" and setting == 0 and not has_zeros(activation):
        raise UsageError(f"fat: epsilon 0 skips exact zeros, and {activation} has none; give a larger one, or use pplp")


def search_walks() -> int:
    """Walks that `Sparsing.search` takes at most."""
    return 1 + math.ceil(math.log2(1 / TOLERANCE))


class Walks:
    """Progress of all walks of a measurement together, in parts of `total` walks of equal size."""

    def __init__(self, progress: Progress, total: int, most: bool) -> None:
        self._progress, self._total, self._most = progress, total, "at most " if most else ""
        self._walk = 0

    def begin(self, what: str) -> Progress:
        """For the next walk."""
        before = self._walk
        self._walk += 1
        self._total = max(self._total, self._walk)
        name = f"walk {self._walk} of {self._most}{self._total}, {what}"

        def tell(layer: str, done: int, each: int) -> None:
            self._progress(f"{name}, {layer}", WALK * before + WALK * done // each, WALK * self._total)

        return tell


class Sparsing:
    """Measures one model on the windows of a text. `open_sparsing` makes one.

    Holds one layer's weights and a block's activations at a time, and what `Samples` states on disk.
    """

    def __init__(self, model: Model, windows: Windows, samples: Samples, work: Path, walks: Walks) -> None:
        self.model, self.windows, self.samples = model, windows, samples
        self._work, self._walks = work, walks
        self.dense_loss = math.nan  # nats per predicted token; set by `dense`
        self.density: tuple[float, ...] = ()  # share of act(g) that is not zero, per layer

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))

    def dense(self, collect: bool) -> None:
        """Walks the dense model for its loss; with `collect` this walk also fills the samples."""
        seen = np.zeros(self.model.layers)

        def visit(block: Block) -> None:
            seen[block.layer] += np.count_nonzero(activated(self.model, block))
            if collect:
                self.samples.add(block)

        self.dense_loss = self._loss("dense model", visit)
        self.density = tuple((seen / (self.tokens * self.model.intermediate_size)).tolist())

    def at(self, metric: str, setting: float) -> Point:
        """The metric measured at one setting (for pplp: a CETT target)."""
        model, quantity = self.model, METRICS[metric]
        find = self._finder(metric, setting)
        thresholds = np.zeros(model.layers)
        counts = np.zeros((model.layers, model.intermediate_size), np.int64)
        norms: list[np.ndarray] = []

        def on_layer(index: int, weights: LayerWeights) -> None:
            thresholds[index] = find(index, weights)
            norms[:] = [weights.down_norms]

        def visit(block: Block) -> np.ndarray:
            mask = active(magnitude(quantity, activated(model, block), block.hidden, norms[0]), thresholds[block.layer])
            counts[block.layer] += mask.sum(axis=0)
            return mask

        loss = self._loss(f"{metric} {setting:.4g}", visit, on_layer)
        return Point(
            metric,
            setting,
            tuple(thresholds.tolist()),
            tuple((counts.sum(axis=1) / (self.tokens * model.intermediate_size)).tolist()),
            tuple(dead_neurons(row, self.tokens) for row in counts),
            math.exp(loss - self.dense_loss),
        )

    def frontier(self, metric: str, settings: Sequence[float]) -> list[Point]:
        """One point per setting."""
        return [self.at(metric, setting) for setting in settings]

    def search(self, metric: str, ppl_ratio: float) -> Point:
        """The sparsest point found whose perplexity ratio is below `ppl_ratio` (above 1), by bisection.

        For pplp this is the published outer search: one CETT target for all layers, in [0, 1], to 1e-6. It stops early
        when the sets at both ends of the interval differ in less than 1e-4 of the neurons. Assumes that perplexity
        rises with the setting, as published. UsageError when even the mildest setting costs more.
        """
        setting, low, high = self._range(metric)
        best, beyond = self.at(metric, setting(low)), None
        if best.ppl_ratio >= ppl_ratio:
            raise UsageError(f"{metric}: perplexity ratio {best.ppl_ratio:.4f} when hardly a neuron is skipped")
        least = TOLERANCE * (high - low)  # `search_walks` counts on it
        while high - low > least and not (beyond and self._same(best, beyond)):
            middle = (low + high) / 2
            point = self.at(metric, setting(middle))
            if point.ppl_ratio < ppl_ratio:
                best, low = point, middle
            else:
                beyond, high = point, middle
        return best

    def _range(self, metric: str) -> tuple[Callable[[float], float], float, float]:
        """(from strictness to setting, least and greatest strictness)"""
        if metric == "topk":
            return lambda strictness: 1 - strictness, 0.0, 1.0
        if metric == "fat":
            return float, 0.0, max(self.samples.largest(layer) for layer in range(self.model.layers))
        return float, 0.0, 1.0

    def _same(self, one: Point, other: Point) -> bool:
        differences = [
            self.samples.between(METRICS[one.metric], layer, low, high)
            for layer, (low, high) in enumerate(zip(one.thresholds, other.thresholds, strict=True))
        ]
        return float(np.mean(differences)) < SAME

    def _finder(self, metric: str, setting: float) -> Find:
        """How a layer's threshold is found at a setting."""
        samples = self.samples
        if metric == "pplp":
            return lambda layer, weights: samples.cett(layer, weights).largest_threshold(setting)
        if metric == "teal":
            return lambda layer, _: teal_threshold(samples.hidden(layer), setting) if setting < 1 else EVERYTHING
        if metric == "fat":
            return lambda *_: fat_threshold(setting)
        quantile = top_k_threshold if metric == "topk" else cats_threshold
        return lambda layer, _: quantile(samples.gate(layer), setting)

    def _loss(
        self,
        what: str,
        visit: Callable[[Block], np.ndarray | None],
        on_layer: Callable[[int, LayerWeights], None] | None = None,
    ) -> float:
        """Mean nats per predicted token of a walk."""

        progress = self._walks.begin(what)
        work = self._work if self.tokens * self.model.hidden_size * 4 > IN_MEMORY else None
        states = walk(self.model, self.windows, visit, on_layer=on_layer, work=work, progress=progress)
        try:
            loss = float(losses(self.model, states, self.windows).mean())
        finally:
            states.remove()
        if not math.isfinite(loss):
            raise NumericError(f"{self.model.directory}: {what}: the loss is {loss}, expected a finite number")
        return loss


def activated(model: Model, block: Block) -> np.ndarray:
    """a = act(g) of a block, [t, I]."""
    return activate(model.activation.name, model.activation.param, block.gate)


@contextmanager
def _temporary() -> Iterator[str]:
    with TemporaryDirectory(prefix="flashsparse-") as work:
        try:
            yield work
        except OSError as problem:
            if problem.errno not in FULL_ERRNOS:
                raise
            where = Path(work).parent
            raise ConvertError(
                f"{where}: disk full ({problem.strerror}); set TMPDIR to another, or use fewer tokens"
            ) from problem


@contextmanager
def open_sparsing(
    model: Model,
    windows: Windows,
    metrics: Sequence[str],
    calibration: Windows | None = None,
    sample_tokens: int = SAMPLE_TOKENS,
    progress: Progress | None = None,
    walks: int = 1,
) -> Iterator[Sparsing]:
    """Walks the dense model once and yields what measures it. Temporary files are gone at the end.

    Thresholds are found on at most `sample_tokens` tokens, evenly spaced, of `calibration` (else of `windows`);
    perplexity and ratios are measured on `windows`. `metrics` says which samples are needed. `progress` is told of this
    walk and of the `walks` that follow, 1 for a setting, at most `search_walks()` for a search, as parts of one whole.
    Raises ConvertError when the disk of temporary files is full.
    """
    told = Walks(progress or (lambda what, done, total: None), 1 + (calibration is not None) + walks, walks > 1)
    with _temporary() as work:
        source = windows if calibration is None else calibration
        quantities = {"gate" if METRICS[metric] == "gate" else "hidden" for metric in metrics}
        samples = Samples(model, source, quantities, sample_tokens, Path(work))
        sparsing = Sparsing(model, windows, samples, Path(work) / "walk", told)
        if calibration is not None:
            tell = told.begin("calibration text")
            walk(model, calibration, samples.add, work=Path(work) / "walk", progress=tell).remove()
        sparsing.dense(collect=calibration is None)
        yield sparsing
