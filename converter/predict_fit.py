"""One layer's predictor: fitted to its weights, its threshold or k found on a sample of tokens, then tensors and facts.

Owns what is kept of a layer's tokens (bounded) and what is written of its results. Which tokens are walked and what
becomes of targets that concern all layers at once is decided elsewhere.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from converter.model import LayerWeights
from converter.predict_options import AUTO, BITS, DEFAULT_BITS, SIZING_RECALL, THRESHOLD_BITS, PredictOptions
from converter.predictors.copies import Copies, fit_gate_copy, fit_gate_up_copy, weighed
from converter.predictors.low_rank import LowRank, Moments, truncated_svd, whitened_svd
from converter.predictors.powerinfer import Imported
from converter.predictors.sizing import Candidate, choose, copy_bytes, low_rank_bytes
from converter.predictors.thresholds import Calibrated, calibrate, measure
from converter.predictors.train import labels, train
from converter.walk import Block
from flashsparse.pack.manifest import Activation
from flashsparse.sparsity.activations import active
from flashsparse.sparsity.low_bit import fitting_group
from flashsparse.sparsity.selection import scores_from_gate
from flashsparse.sparsity.spec import LayerSpec
from flashsparse.sparsity.thresholds_file import Thresholds

SAMPLE_TOKENS = 2048  # thresholds are found on them; predictors are fitted on the others
SAMPLE_SHARE = 4  # at most one token in so many
TRAINING_BYTES = 512 << 20  # of one [T, I] array of the tokens to train on
CURVE_PAIRS = 4 << 20  # (token, neuron) pairs that a curve is measured on
# Value recalls at which a curve is kept: finer towards 1, where thresholds move fastest.
GRID = (0.01, *np.linspace(0.05, 0.85, 17).tolist(), *(1 - np.geomspace(0.125, 1e-4, 21)).tolist(), 1.0)
SMALLEST = float(np.finfo(np.float32).tiny)  # what a score must reach where a threshold of 0 would let zeros pass
RESULT = "predictor"  # name of the tensor with a layer's facts
RANK_SHARES = (16, 8, 4, 2)  # of the hidden size, tried for --predictor-rank auto
WHOLE = LayerSpec(every=True, density=1.0, value_recall=1.0, recall=1.0)
Fit = Copies | LowRank | None  # None: the exact gate


@dataclass(frozen=True)
class Recipe:
    """How every layer is fitted: the options, resolved for a model of `hidden` inputs and `width` neurons.

    `layer_bytes` is one layer's FFN in the pack, which sizes are weighed against; `override` the activation that the
    user named in place of the configuration's.
    """

    options: PredictOptions
    kind: str
    score: str
    activation: Activation
    layers: int
    hidden: int
    width: int
    layer_bytes: int
    override: str | None = None
    thresholds: Thresholds | None = None
    imported: Imported | None = None

    @property
    def by_value(self) -> bool:
        """Whether thresholds are found for scores in proportion to value: not a file's, nor for plain recall."""
        return self.thresholds is None and self.options.target not in (None, "recall")

    @property
    def sizes(self) -> list[tuple[int | None, int | None]]:
        """The (bits, rank) to try; one unless the size is chosen per layer."""
        bits, rank = self.options.bits, self.options.rank
        if self.score in ("gate_copy", "gate_up_copy"):
            default = THRESHOLD_BITS if self.kind == "gate-up-copy" and self.thresholds else DEFAULT_BITS
            return [(size, None) for size in BITS] if bits == AUTO else [(int(bits or default), None)]
        if self.kind in ("exact-gate", "imported"):
            return [(None, None)]
        if rank == AUTO:
            ranks = sorted({max(1, min(self.hidden, self.width) // share) for share in RANK_SHARES})
            return [(None, size) for size in ranks]
        return [(None, int(rank or self._default_rank))]

    @property
    def _default_rank(self) -> int:
        """The rank that takes as many bytes as the default copy of the gate (would, where no group size fits it)."""
        group = 32 if self.hidden % 64 else 64
        copy = copy_bytes(self.width, self.hidden, DEFAULT_BITS, group)
        return max(1, copy // low_rank_bytes(self.width, self.hidden, 1))

    def boundary(self, layer: int) -> float:
        """The threshold on scores without a text: a file's, or where the activation's zeros begin."""
        name, param = self.activation.name, self.activation.param
        if self.thresholds is not None:
            return self._from_file(name, param, self.thresholds.thresholds[layer])
        if self.imported is not None:
            return float(np.float32(self.imported.threshold))
        return max(SMALLEST, _float32(param or 0.0)) if self.score != "gate_up_copy" else SMALLEST

    def _from_file(self, name: str, param: float | None, threshold: float) -> float:
        """A threshold on |act(g)| or on the value, as one on scores (raw pre-activations but for silu).

        It skips exact zeros, as `sparsity` does, where the activation has them.
        """
        if self.score != "gate_up_copy" and name != "silu":
            threshold = math.sqrt(threshold) if name == "relu2" else max(threshold, param or 0.0)
        return _float32(threshold) if name == "silu" else max(SMALLEST, _float32(threshold))


def _float32(value: float) -> float:
    return float(np.float32(min(value, float(np.finfo(np.float32).max))))


@dataclass(frozen=True)
class Sample:
    """Some tokens of one layer: x [n, d]; pre-activations `gate` [n, I] where the score is exact, else None.

    values [n, I] = |h| * norm of the down column, active bool [n, I].
    """

    x: np.ndarray
    gate: np.ndarray | None
    values: np.ndarray
    active: np.ndarray


@dataclass(frozen=True)
class LayerResult:
    """A layer's part of the manifest. `curve`: what each value recall of GRID takes, where a target asks for it."""

    spec: LayerSpec
    true_density: float | None = None
    curve: tuple[Calibrated, ...] = ()

    def to_tensor(self) -> np.ndarray:
        """uint8: the JSON of the result, to be kept among tensors."""
        return np.frombuffer(json.dumps(asdict(self), sort_keys=True).encode(), np.uint8)

    @staticmethod
    def from_tensor(data: np.ndarray) -> LayerResult:
        value: dict[str, Any] = json.loads(data.tobytes())
        curve = tuple(Calibrated(**point) for point in value["curve"])
        return LayerResult(LayerSpec(**value["spec"]), value["true_density"], curve)


class LayerTokens:
    """What is kept of a layer's tokens while they pass: the sample, sums for fitting, and inputs to train on."""

    def __init__(self, recipe: Recipe, weights: LayerWeights, tokens: int) -> None:
        self._recipe, self._norms = recipe, weights.down_norms
        self.moments = Moments(recipe.hidden)
        self._seen = 0
        held = max(1, min(SAMPLE_TOKENS, tokens // SAMPLE_SHARE))
        self._held = _spread(np.arange(tokens), held)
        others = np.setdiff1d(np.arange(tokens), self._held)
        count = TRAINING_BYTES // (4 * recipe.width) if recipe.kind == "trained" else 0
        self._trained = _spread(others, count)
        self.sample = self._room(held, recipe.kind == "exact-gate")
        self.training = self._room(len(self._trained), False)

    def _room(self, tokens: int, gate: bool) -> Sample:
        wide = tokens, self._recipe.width
        return Sample(
            np.empty((tokens, self._recipe.hidden), np.float32),
            np.empty(wide, np.float32) if gate else None,
            np.empty(wide, np.float32),
            np.empty(wide, bool),
        )

    def add(self, block: Block) -> None:
        """The next tokens, in the order of the walk."""
        span = self._seen, self._seen + len(block.x)
        self._keep(block, span, self._held, self.sample)
        self._keep(block, span, self._trained, self.training)
        fitted = np.setdiff1d(np.arange(*span), self._held) - span[0]
        self.moments.add(block.x[fitted])
        self._seen = span[1]

    def _keep(self, block: Block, span: tuple[int, int], chosen: np.ndarray, into: Sample) -> None:
        first, end = np.searchsorted(chosen, span)
        rows = chosen[first:end] - span[0]
        activation = self._recipe.activation
        into.x[first:end] = block.x[rows]
        into.values[first:end] = np.abs(block.hidden[rows]) * self._norms
        into.active[first:end] = active(activation.name, activation.param, block.gate[rows])
        if into.gate is not None:
            into.gate[first:end] = block.gate[rows]


def _spread(places: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the places, evenly spaced, ascending."""
    if count >= len(places):
        return places
    return places[np.linspace(0, len(places) - 1, count).astype(np.int64)] if count else places[:0]


def fit_layer(
    recipe: Recipe, layer: int, weights: LayerWeights, tokens: LayerTokens | None
) -> tuple[dict[str, np.ndarray], LayerResult]:
    """Fits a layer's predictor and decides its selection: the tensors of the predictor file, and the facts.

    `tokens` is None without calibration text. Raises UsageError for sizes that do not fit the model.
    """
    bits, rank = recipe.sizes[0] if len(recipe.sizes) == 1 else (None, None)
    if len(recipe.sizes) > 1:
        assert tokens is not None
        chosen = _choose_size(recipe, layer, weights, tokens)
        if chosen.every:
            return {}, LayerResult(WHOLE, _density(tokens.sample))
        bits, rank = chosen.bits, chosen.rank
    fit = _fit(recipe, layer, weights, tokens, bits, rank)
    spec = _form(fit)
    tensors = {} if fit is None else fit.tensors()
    if tokens is None:
        return tensors, LayerResult(replace(spec, threshold=recipe.boundary(layer)))
    result = _selected(recipe, layer, spec, scores(recipe, fit, tokens.sample), tokens.sample)
    if tensors and result.spec.density == 1:  # what lets everything pass is not worth its bytes
        return {}, replace(result, spec=WHOLE)
    return tensors, result


def _density(sample: Sample) -> float:
    return float(sample.active.mean(dtype=np.float64))


def scores(recipe: Recipe, fit: Fit, sample: Sample) -> np.ndarray:
    """float32 [n, I], as at run time."""
    name, param = recipe.activation.name, recipe.activation.param
    if fit is None:
        assert sample.gate is not None
        return scores_from_gate(name, param, sample.gate)
    return fit.scores(name, param, sample.x) if isinstance(fit, Copies) else fit.logits(sample.x)


def _selected(recipe: Recipe, layer: int, spec: LayerSpec, found: np.ndarray, sample: Sample) -> LayerResult:
    """The layer's threshold or k; for targets over all layers a curve of them."""
    options, true_density = recipe.options, _density(sample)
    if options.target in ("density_ratio", "ppl_ratio"):
        return LayerResult(spec, true_density, _curve(options.selection, found, sample))
    if options.target is None:
        chosen = measure(found, sample.values, sample.active, "threshold", recipe.boundary(layer))
    else:
        assert options.target_value is not None
        goal = options.target_value
        chosen = calibrate(found, sample.values, sample.active, options.target, goal, options.selection)
    return LayerResult(selecting(spec, chosen), true_density)


def selecting(spec: LayerSpec, chosen: Calibrated) -> LayerSpec:
    """The layer with a selection and what it was measured to do."""
    shares = {name: min(max(getattr(chosen, name), 0.0), 1.0) for name in ("density", "value_recall", "recall")}
    return replace(spec, threshold=chosen.threshold, k=chosen.k, **shares)  # sums may round to a little above 1


def _curve(selection: str, found: np.ndarray, sample: Sample) -> tuple[Calibrated, ...]:
    rows = _spread(np.arange(len(found)), max(1, CURVE_PAIRS // found.shape[1]))
    parts = found[rows], sample.values[rows], sample.active[rows]
    return tuple(calibrate(*parts, "value_recall", goal, selection) for goal in GRID)


def _choose_size(recipe: Recipe, layer: int, weights: LayerWeights, tokens: LayerTokens) -> Candidate:
    """The size that reaches the target at the least cost in memory, which may be the layer whole."""
    options, sample = recipe.options, tokens.sample
    own = options.target in ("value_recall", "recall") and options.target_value is not None
    target, goal = (str(options.target), options.target_value) if own else ("value_recall", SIZING_RECALL)
    assert goal is not None
    found = []
    for bits, rank in recipe.sizes:
        fit = _fit(recipe, layer, weights, tokens, bits, rank)
        chosen = calibrate(scores(recipe, fit, sample), sample.values, sample.active, target, goal, options.selection)
        reached = chosen.value_recall if target == "value_recall" else chosen.recall
        found.append(Candidate(bits, rank, _bytes(fit), chosen.density, reached))
    return choose(found, recipe.layer_bytes, goal)


def _bytes(fit: Fit) -> int:
    return 0 if fit is None else sum(values.nbytes for values in fit.tensors().values())


def _fit(
    recipe: Recipe, layer: int, weights: LayerWeights, tokens: LayerTokens | None, bits: int | None, rank: int | None
) -> Fit:
    gate, bias = weights.scoring, weights.scoring_bias
    if recipe.imported is not None:
        return recipe.imported.layer(layer, weights.ffn_norm).stored()
    if bits is not None:
        return _copies(recipe, weights, tokens, bits)
    if rank is None:
        return None
    if recipe.kind == "svd":
        return truncated_svd(gate, rank, bias).stored()
    assert tokens is not None
    start = whitened_svd(gate, rank, tokens.moments, bias)
    return _trained(start, tokens.training).stored() if recipe.kind == "trained" else start.stored()


def _copies(recipe: Recipe, weights: LayerWeights, tokens: LayerTokens | None, bits: int) -> Copies:
    gate, bias, group = weights.scoring, weights.scoring_bias, fitting_group(recipe.hidden)
    inputs = None if tokens is None else tokens.moments
    if recipe.score == "gate_copy":
        copy = fit_gate_copy(gate, bias, bits, group, inputs)
        return weighed(copy, weights, recipe.activation.name, recipe.activation.param) if recipe.by_value else copy
    gated = weights.gate is not None
    # Thresholds on |h| alone: the norms are left out of the score.
    plain = recipe.thresholds is not None and recipe.thresholds.quantity == "hidden"
    norms = np.ones_like(weights.down_norms) if plain else weights.down_norms
    up, up_bias = (weights.up, weights.up_bias) if gated else (None, None)
    return fit_gate_up_copy(gate, bias, up, up_bias, norms, bits, group, inputs)


def _trained(start: LowRank, training: Sample) -> LowRank:
    """Trained from a closed form, on what a neuron is worth rather than on whether it fires."""
    wanted = labels("value", training.active, training.values, np.ones(1, np.float32))
    return train(training.x, wanted, start.rank, start=start).predictor


def _form(fit: Fit) -> LayerSpec:
    if isinstance(fit, Copies):
        return LayerSpec(bits=fit.gate.bits, group_size=fit.gate.group)
    return LayerSpec() if fit is None else LayerSpec(rank=fit.rank, relu=fit.relu)
