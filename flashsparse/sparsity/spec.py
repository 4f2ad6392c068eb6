"""What a pack says of its predictor: how each layer scores neurons and selects them, and what calibration measured.

Owns the strict reading and writing of the manifest's `predictor` object and the tensors that it implies; nothing here
reads or computes weights. `docs/format.md` is the specification.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from flashsparse.pack.checks import Node

SCORES = ("gate_copy", "gate_up_copy", "low_rank", "gate")
SELECTIONS = ("threshold", "topk", "topk_and_threshold")
TARGETS = ("value_recall", "recall", "density", "density_ratio", "ppl_ratio", "thresholds", "none")
COPY_BITS = (1, 2, 3, 4)
COPY_GROUPS = (32, 64, 128)
MAX_FLOAT32 = 3.4028234663852886e38
T = TypeVar("T")
Stored = dict[str, tuple[str, tuple[int, ...]]]  # name -> (type, shape)


@dataclass(frozen=True)
class LayerSpec:
    """One layer. `bits` and `group_size` are of copies, `rank` and `relu` of low_rank.

    A neuron is selected when its score reaches `threshold` (compared in float32), or is among the `k` highest of the
    token. `density`, `value_recall` and `recall` (0..1) were measured on the calibration text. `every`: the layer is
    computed whole and has no predictor.
    """

    bits: int | None = None
    group_size: int | None = None
    rank: int | None = None
    relu: bool = False
    threshold: float | None = None
    k: int | None = None
    density: float | None = None
    value_recall: float | None = None
    recall: float | None = None
    every: bool = False

    @property
    def calibrated_density(self) -> float | None:
        """Share of the layer's neurons that a token is expected to select."""
        return 1.0 if self.every else self.density

    def to_dict(self) -> dict[str, Any]:
        """The manifest's object: measured and chosen numbers are floats, so that their text is one."""
        floats = {name: getattr(self, name) for name in ("threshold", "density", "value_recall", "recall")}
        return vars(self) | {name: None if value is None else float(value) for name, value in floats.items()}


@dataclass(frozen=True)
class PredictorSpec:
    """The predictor of a pack.

    `texts` are the SHA-256 digests of the calibration texts and of those that a file of thresholds was made on, in
    ascending order, each once; `tokens` how many tokens of them were used. Empty and 0 without.
    """

    score: str
    selection: str
    target: str
    target_value: float | None
    texts: tuple[str, ...]
    tokens: int
    layers: tuple[LayerSpec, ...]

    @property
    def calibrated_density(self) -> float | None:
        """The mean of the layers' calibrated densities; None when one of them is not known."""
        found = [layer.calibrated_density for layer in self.layers]
        known = [density for density in found if density is not None]
        return sum(known) / len(found) if len(known) == len(found) else None

    @property
    def has_tensors(self) -> bool:
        """Whether the pack has a predictor file: not for the exact gate, nor when every layer is computed whole."""
        return self.score != "gate" and not all(layer.every for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The manifest's object."""
        value = None if self.target_value is None else float(self.target_value)
        layers = [layer.to_dict() for layer in self.layers]
        return vars(self) | {"target_value": value, "texts": list(self.texts), "layers": layers}


@dataclass(frozen=True)
class Shape:
    """The part of a model's shape that a predictor depends on."""

    layers: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    gate_bias: bool = False  # of the scoring matrix: the gate, or the only input matrix
    up_bias: bool = False


def read_spec(node: Node, shape: Shape) -> PredictorSpec:
    """The `predictor` object of a manifest. Raises PackError naming the field, what was found and what was expected."""
    score, selection = node.choice("score", SCORES), node.choice("selection", SELECTIONS)
    target = node.choice("target", TARGETS)
    value = node.number("target_value")
    stated = target in ("none", "thresholds")
    if (value is None) != stated or (value is not None and value <= 0):
        node.fail("target_value", value, f"{'null' if stated else 'a number > 0'} for target {target!r}")
    texts, tokens = node.sha256_set("texts"), node.integer("tokens", 0)
    if (not texts) != (tokens == 0):
        node.fail("tokens", tokens, "0 without a calibration text, the number of its tokens with one")
    layers = tuple(_read_layer(child, score, selection, shape, tokens > 0) for child in node.items("layers"))
    if len(layers) != shape.layers:
        node.fail("layers", len(layers), f"an object for each of {shape.layers} layers")
    return node.finish(PredictorSpec(score, selection, target, value, texts, tokens, layers))


def _read_layer(node: Node, score: str, selection: str, shape: Shape, calibrated: bool) -> LayerSpec:
    every = node.boolean("every")
    copy = score in ("gate_copy", "gate_up_copy") and not every
    ranked = score == "low_rank" and not every
    return node.finish(
        LayerSpec(
            bits=_only(copy, node, "bits", lambda: node.choice("bits", COPY_BITS)),
            group_size=_only(copy, node, "group_size", lambda: _group(node, shape.hidden_size)),
            rank=_only(ranked, node, "rank", lambda: node.integer("rank", 1, shape.intermediate_size)),
            relu=_relu(node, ranked),
            threshold=_only("threshold" in selection and not every, node, "threshold", lambda: _threshold(node)),
            k=_only(
                "topk" in selection and not every, node, "k", lambda: node.integer("k", 1, shape.intermediate_size)
            ),
            density=_share(node, "density", calibrated),
            value_recall=_share(node, "value_recall", calibrated),
            recall=_share(node, "recall", calibrated),
            every=every,
        )
    )


def _only(applies: bool, node: Node, key: str, read: Callable[[], T]) -> T | None:
    """What `read` takes of a field that applies to the layer; null else."""
    if applies:
        return read()
    if not node.null(key):
        node.fail(key, node.value[key], "null in a layer of this kind")
    return None


def _group(node: Node, hidden_size: int) -> int:
    group = node.choice("group_size", COPY_GROUPS)
    if hidden_size % group:
        node.fail("group_size", group, f"a divisor of hidden_size ({hidden_size})")
    return group


def _relu(node: Node, allowed: bool) -> bool:
    relu = node.boolean("relu")
    if relu and not allowed:
        node.fail("relu", relu, "false in a layer without low-rank factors")
    return relu


def _threshold(node: Node) -> float:
    threshold = node.number("threshold")
    if threshold is None or abs(threshold) > MAX_FLOAT32:
        node.fail("threshold", threshold, "a floating-point number in float32's range")
    return threshold


def _share(node: Node, key: str, calibrated: bool) -> float | None:
    share = node.number(key)
    if share is not None and not (calibrated and 0 <= share <= 1):
        node.fail(key, share, "a number in 0..1" if calibrated else "null without a calibration text")
    return share


def predictor_tensors(spec: PredictorSpec, shape: Shape) -> Stored:
    """Name -> (type, shape) of every tensor that the predictor file must have (low_rank: may, for `fc2.bias`)."""
    if not spec.has_tensors:
        return {}
    tensors: Stored = {}
    for index, layer in enumerate(spec.layers):
        if not layer.every:
            tensors |= _layer_tensors(spec.score, f"layers.{index}", layer, shape)
    return tensors


def optional_tensors(names: Iterable[str]) -> set[str]:
    """Those of `predictor_tensors` that a pack may lack."""
    return {name for name in names if name.endswith(".fc2.bias")}


def _layer_tensors(score: str, base: str, layer: LayerSpec, shape: Shape) -> Stored:
    d, records = shape.hidden_size, shape.intermediate_size
    if score == "low_rank":
        assert layer.rank is not None
        factors: Stored = {f"{base}.fc1.weight": ("F16", (layer.rank, d))}
        return factors | {f"{base}.fc2.weight": ("F16", (records, layer.rank)), f"{base}.fc2.bias": ("F32", (records,))}
    tensors = _copy_tensors(f"{base}.gate", layer, shape, shape.gate_bias)
    if score == "gate_up_copy":
        if shape.gated:
            tensors |= _copy_tensors(f"{base}.up", layer, shape, shape.up_bias)
        tensors[f"{base}.down_norm"] = ("F32", (records,))
    return tensors


def _copy_tensors(base: str, layer: LayerSpec, shape: Shape, bias: bool) -> Stored:
    assert layer.bits is not None and layer.group_size is not None
    d, records = shape.hidden_size, shape.intermediate_size
    groups = ("F16", (records, d // layer.group_size))
    tensors: Stored = {f"{base}.weight": ("U32", (records, d * layer.bits // 32))}
    tensors |= {f"{base}.scales": groups, f"{base}.biases": groups}
    return tensors | ({f"{base}.bias": ("F32", (records,))} if bias else {})
