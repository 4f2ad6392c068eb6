"""The first stage of a conversion to tier predict: every layer's predictor and what the manifest says of it.

Owns its order, its directory of work and its resuming; layers are fitted by `predict_fit`, targets over all layers met
by `predict_target`. One layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converter.calibrate import WINDOW, Collector, calibrate
from converter.calibration_files import layer_path, write_layer
from converter.disk import OutputFile
from converter.model import LayerWeights, Model, open_model
from converter.predict_fit import RESULT, LayerResult, LayerTokens, Recipe, fit_layer
from converter.predict_options import COPIES, SCORES, PredictOptions
from converter.predict_target import Tensors, meet_density_ratio, meet_ppl_ratio
from converter.predictors.low_rank import check_rank
from converter.predictors.powerinfer import Imported, load_imported
from converter.text import read_ids
from converter.walk import Block, Progress, windows_of
from flashsparse.errors import CheckpointError, ConvertError, PackError, UnsupportedModelError, UsageError
from flashsparse.models.config import NormalizedModel
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.predictor import check_predictor
from flashsparse.pack.safetensors import Header, header_bytes, read_header, read_tensor, shape_bytes, storage_order
from flashsparse.sparsity.activations import has_zeros
from flashsparse.sparsity.calibration import TENSORS
from flashsparse.sparsity.low_bit import fitting_group
from flashsparse.sparsity.spec import LayerSpec, PredictorSpec, Shape, Stored, predictor_tensors
from flashsparse.sparsity.texts import text_digests
from flashsparse.sparsity.thresholds_file import ModelShape, Thresholds, read_thresholds

JUDGED_TOKENS = 4096  # at most, of the calibration text, that a perplexity ratio is measured on
JUDGED_SHARE = 4  # one token in so many, where the text is short
_KINDS = {"gate": ("exact-gate", "gate-copy"), "value": ("gate-up-copy",), "hidden": ("gate-up-copy",)}


@dataclass(frozen=True)
class Fitted:
    """A finished predictor: the manifest's part, and the predictor file's tensors with the files that hold them."""

    spec: PredictorSpec
    stored: Stored  # in the order of the predictor file
    tensors: Tensors

    @property
    def file_bytes(self) -> int:
        """Bytes of the predictor file; 0 when there is none."""
        if not self.stored:
            return 0
        return len(header_bytes(self.stored)) + sum(shape_bytes(*tensor) for tensor in self.stored.values())


def make_recipe(options: PredictOptions, model: NormalizedModel, layer_bytes: int, override: str | None) -> Recipe:
    """The options for a model, files of thresholds and imported predictors opened and checked against it.

    `override` is what the user named in place of the configuration's activation.

    Raises UsageError, CheckpointError or UnsupportedModelError for what does not fit the model.
    """
    thresholds = None if options.thresholds is None else _thresholds(options.thresholds, model)
    imported = None if options.imported is None else _imported(options.imported, model)
    kind = options.kind or _KINDS[thresholds.quantity if thresholds else "gate"][0]
    if thresholds is not None and kind not in _KINDS[thresholds.quantity]:
        raise UsageError(
            f"--predictor {kind} and --thresholds {options.thresholds}: its thresholds are on {thresholds.quantity!r}, "
            f"expected {' or '.join(_KINDS[thresholds.quantity])}"
        )
    if not options.texts and thresholds is None and not has_zeros(model.activation.name):
        raise UsageError(
            f"--tier predict: {model.activation.name} has no zeros that would tell which neurons count; give a text "
            "with --calibrate FILE, or thresholds with --thresholds FILE"
        )
    if kind in COPIES:
        _check_copies(kind, model.hidden_size)
    if isinstance(options.rank, int):
        check_rank(options.rank, model.hidden_size, model.intermediate_size)
    return Recipe(
        options,
        kind,
        SCORES.get(kind, "low_rank"),
        model.activation,
        model.layers,
        model.hidden_size,
        model.intermediate_size,
        layer_bytes,
        override,
        thresholds,
        imported,
    )


def _check_copies(kind: str, hidden: int) -> None:
    try:
        fitting_group(hidden)
    except UsageError as problem:
        raise UsageError(f"--predictor {kind}: {problem}; use --predictor svd or exact-gate") from None


def _thresholds(path: Path, model: NormalizedModel) -> Thresholds:
    found = read_thresholds(path)
    expected = ModelShape(
        model.source_model_type, model.hidden_size, model.intermediate_size, model.layers, model.activation.name
    )
    for name, value in vars(expected).items():
        if getattr(found.model, name) != value:
            raise UsageError(
                f"{path}: {name}: found {getattr(found.model, name)!r}, expected {value!r} as the model to convert "
                "has; make the thresholds with `flashsparse sparsity` on this model"
            )
    return found


def _imported(path: Path, model: NormalizedModel) -> Imported:
    if model.family == "opt":
        raise UnsupportedModelError(
            f"--predictor-from {path}: PowerInfer's predictors take the input before the norm, and OPT's LayerNorm "
            "cannot be folded into them; expected a model with RMSNorm, or use --predictor"
        )
    return load_imported(path, model.layers, model.hidden_size, model.intermediate_size)


def check_texts(recipe: Recipe, source: Path) -> None:
    """Reads the texts once, before there is anything to go on with. Raises UsageError or CheckpointError."""
    if recipe.options.texts:
        text_digests(recipe.options.texts)  # refuses a text that is given twice
        with open_model(source, recipe.override) as model:
            _Texts.read(recipe.options, model)


def fit(recipe: Recipe, source: Path, work: Path, progress: Progress | None, extra: Sequence[Collector] = ()) -> Fitted:
    """Fits all layers, or those that an earlier run in `work` did not, and meets the target.

    `extra` collectors see the same walk, if there is a text.

    `source` is the checkpoint's directory. Raises what calibration raises, and OSError when writing fails.
    """
    if not recipe.options.texts:
        _fit_layers(recipe, source, work, progress)
        return _assemble(recipe, _own_tensors(work, recipe.layers), None)
    with open_model(source, recipe.override) as model:
        texts = _Texts.read(recipe.options, model)
        try:
            calibrate(
                source,
                recipe.options.texts,
                out=work,
                tokens=texts.asked,
                window=recipe.options.window,
                activation=recipe.override,
                progress=progress,
                extra=[_Fitting(recipe, texts.walked), *extra],
            )
        except ConvertError as problem:
            if isinstance(problem.__cause__, OSError):  # whoever converts says what is kept and how to go on
                raise problem.__cause__ from problem
            raise
        header = read_header(work / TENSORS, CheckpointError)
        tensors = dict.fromkeys(header.tensors, header)
        specs = None
        if recipe.options.target == "ppl_ratio":
            judged = work / "perplexity"
            specs = meet_ppl_ratio(recipe, _results(recipe, tensors), tensors, model, texts.judged, judged, progress)
        return _assemble(recipe, tensors, specs, texts.total)


@dataclass(frozen=True)
class _Texts:
    """The calibration text in tokens: how many are asked for and walked, and the windows that perplexities are of."""

    asked: int
    walked: int
    judged: list[np.ndarray]

    @property
    def total(self) -> int:
        return self.walked + sum(map(len, self.judged))

    @staticmethod
    def read(options: PredictOptions, model: Model) -> _Texts:
        """A perplexity ratio is measured on the last tokens of each text, which nothing is fitted to."""
        length = min(WINDOW, model.context) if options.window is None else options.window
        if length > model.context:
            raise UsageError(f"--calibrate-window: found {length}, expected at most {model.context}, the context")
        tokenizer, asked = model.tokenizer(), options.tokens
        ids = read_ids(tokenizer, options.texts, asked)
        if sum(map(len, ids)) < min(length, asked):
            raise UsageError(
                f"--calibrate: the texts hold {sum(map(len, ids))} tokens, expected at least one window of {length}; "
                "give more text, or a smaller --calibrate-window"
            )
        judged: list[np.ndarray] = []
        if options.target == "ppl_ratio":
            total = sum(map(len, ids))
            asked = total - min(JUDGED_TOKENS, total // JUDGED_SHARE)
            fitted = read_ids(tokenizer, options.texts, max(asked, 1))
            pairs = zip(ids, fitted, strict=True)
            judged = [part for some, first in pairs for part in windows_of(some[len(first) :], length)]
            ids = fitted
            if asked < length or not judged:
                raise UsageError(
                    f"--target ppl-ratio: the texts hold {total} tokens, expected at least {2 * length} "
                    "to calibrate on and to judge by; give more text, or a smaller --calibrate-window"
                )
        walked = sum(len(part) for some in ids for part in windows_of(some, length))
        if not walked:
            texts = len(options.texts)
            raise UsageError(f"--calibrate-tokens: found {asked} for {texts} texts, expected at least two of one text")
        return _Texts(asked, walked, judged)


class _Fitting:
    """The collector that fits a layer's predictor at the end of its walk."""

    name = "predictor"

    def __init__(self, recipe: Recipe, tokens: int) -> None:
        self._recipe, self._total = recipe, tokens
        self._weights: LayerWeights | None = None
        self._tokens: LayerTokens | None = None

    def options(self) -> dict[str, Any]:
        return self._recipe.options.choices()

    def begin(self, layer: int, weights: LayerWeights) -> None:
        self._weights, self._tokens = weights, LayerTokens(self._recipe, weights, self._total)

    def visit(self, block: Block) -> None:
        assert self._tokens is not None
        self._tokens.add(block)

    def output(self, block: Block, ffn: np.ndarray, after: np.ndarray) -> None:
        """Nothing of a layer's output is needed."""

    def end(self, layer: int) -> dict[str, np.ndarray]:
        assert self._weights is not None
        tensors, result = fit_layer(self._recipe, layer, self._weights, self._tokens)
        self._weights = self._tokens = None
        return tensors | {RESULT: result.to_tensor()}


def _fit_layers(recipe: Recipe, source: Path, work: Path, progress: Progress | None) -> None:
    """Without text: layer by layer, each into a file that is there whole or not at all."""
    work.mkdir(exist_ok=True)
    with open_model(source, recipe.override) as model:
        for layer in range(model.layers):
            if not layer_path(work, layer).exists():
                tensors, result = fit_layer(recipe, layer, model.layer(layer), None)
                write_layer(work, layer, tensors | {RESULT: result.to_tensor()})
            if progress is not None:
                progress(f"layer {layer + 1} of {model.layers}", layer + 1, model.layers)


def _own_tensors(work: Path, layers: int) -> dict[str, Header]:
    headers = [read_header(layer_path(work, layer), CheckpointError) for layer in range(layers)]
    return {name: header for header in headers for name in header.tensors}


def _results(recipe: Recipe, tensors: Tensors) -> list[LayerResult]:
    names = [f"layers.{layer}.{RESULT}" for layer in range(recipe.layers)]
    return [LayerResult.from_tensor(read_tensor(tensors[name], name)) for name in names]


def _assemble(recipe: Recipe, tensors: Tensors, specs: list[LayerSpec] | None, tokens: int = 0) -> Fitted:
    """The manifest's part and the tensors that it implies. `specs` in place of the layers' own selections."""
    options, results = recipe.options, _results(recipe, tensors)
    if specs is None and options.target == "density_ratio":
        assert options.target_value is not None
        specs = meet_density_ratio(results, options.target_value)
    texts, tokens = _texts(recipe, tokens)
    spec = PredictorSpec(
        score=recipe.score,
        selection=options.selection,
        target=options.target or ("thresholds" if recipe.thresholds is not None else "none"),
        target_value=options.target_value,
        texts=texts,
        tokens=tokens,
        layers=tuple(specs or [result.spec for result in results]),
    )
    return Fitted(spec, _stored(spec, recipe, tensors), tensors)


def _texts(recipe: Recipe, tokens: int) -> tuple[tuple[str, ...], int]:
    """Digests of what the pack must not be judged on, a thresholds file's texts included, and how many tokens.

    `tokens` of the options' texts; without them, those of the file's.
    """
    found, own = recipe.thresholds, text_digests(recipe.options.texts)
    if found is None:
        return own, tokens
    return tuple(sorted({*own, *found.texts})), tokens or found.tokens


def _stored(spec: PredictorSpec, recipe: Recipe, tensors: Tensors) -> Stored:
    """The tensors that the manifest's part implies: all biases are asked for, and those that are not there left out."""
    shape = Shape(recipe.layers, recipe.hidden, recipe.width, True, gate_bias=True, up_bias=True)
    wanted = [name for name in predictor_tensors(spec, shape) if name in tensors]
    stored = {name: (info.dtype, info.shape) for name in wanted for info in [tensors[name].tensors[name]]}
    return {name: stored[name] for name in storage_order(stored)}


def write_predictor(
    fitted: Fitted, file: OutputFile, advance: Callable[[int], None], orders: np.ndarray | None = None
) -> None:
    """Writes the predictor file, rows of neurons in `orders` [layers, I]; `advance` is told the bytes written."""
    header = header_bytes(fitted.stored)
    file.write(header)
    advance(len(header))
    for name in fitted.stored:
        values = read_tensor(fitted.tensors[name], name)
        _, layer, part = name.split(".", 2)
        if orders is not None and not part.startswith("fc1."):  # which alone has no row for each neuron
            values = values[orders[int(layer)]]
        data = values.tobytes()
        file.write(data)
        advance(len(data))


def published(recipe: Recipe, source: Path, found: Manifest) -> tuple[str, Fitted | None]:
    """The predictor of a pack that exists, as far as options and texts tell what it must be, or how it differs."""
    spec, options = found.predictor, recipe.options
    if spec is None:
        return f"tier: found {found.tier!r}, expected 'predict'", None
    walked = 0
    if options.texts:
        with open_model(source, recipe.override) as model:
            walked = _Texts.read(options, model).total
    texts, tokens = _texts(recipe, walked)
    target = options.target or ("thresholds" if recipe.thresholds is not None else "none")
    expected = {
        "score": recipe.score,
        "selection": options.selection,
        "target": target,
        "target_value": options.target_value,
        "texts": texts,
        "tokens": tokens,
    }
    for name, value in expected.items():
        if getattr(spec, name) != value:
            return f"predictor.{name}: found {getattr(spec, name)!r}, expected {value!r}", None
    for index, layer in enumerate(spec.layers):
        if not layer.every and (layer.bits, layer.rank) not in recipe.sizes and recipe.imported is None:
            return f"predictor.layers[{index}]: found {layer.bits or layer.rank} bits or rank, expected another", None
        if options.target is None and not layer.every and layer.threshold != recipe.boundary(index):
            return f"predictor.layers[{index}].threshold: found {layer.threshold}, expected another", None
    if not spec.has_tensors:
        return "", Fitted(spec, {}, {})
    header = read_header(found.predictor_path, PackError)
    check_predictor(found, header)
    stored = {info.name: (info.dtype, info.shape) for info in header.tensors.values()}
    return "", Fitted(spec, {name: stored[name] for name in storage_order(stored)}, dict.fromkeys(stored, header))
