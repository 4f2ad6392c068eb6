"""The thresholds file: per-layer thresholds of one model, with the metric and the text they come from, as JSON.

Owns the format, its strict reader and its writer. Thresholds are found by the converter and used where a pack is made.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashsparse.errors import PackError, UsageError
from flashsparse.pack.checks import Node
from flashsparse.pack.manifest import ACTIVATIONS, canonical_json
from flashsparse.sparsity.metrics import METRICS, QUANTITIES

FORMAT = "flashsparse-thresholds"
VERSION = 1


@dataclass(frozen=True)
class ModelShape:
    """What must agree between the model that thresholds were found on and the one they are used for."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    layers: int
    activation: str


@dataclass(frozen=True)
class Thresholds:
    """Thresholds per layer. A neuron is skipped iff its quantity is below its layer's threshold.

    quantity: "gate" |act(g)|, "value" |h| * ||down column||, "hidden" |h|. `arg` is the metric's (a fraction, an
    epsilon, a percentage). `activation_ratio` per layer and `ppl_ratio` are what was measured with them on `tokens`
    tokens; `texts` are the SHA-256 digests of the texts they were found on, in ascending order, each once.
    """

    quantity: str
    metric: str
    arg: float
    model: ModelShape
    thresholds: tuple[float, ...]
    activation_ratio: tuple[float, ...]
    ppl_ratio: float
    texts: tuple[str, ...]
    tokens: int


def write_thresholds(path: str | os.PathLike[str], thresholds: Thresholds) -> None:
    """Writes the canonical JSON of `thresholds`; the file appears whole or not at all. Raises OSError naming it."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(canonical_json({"format": FORMAT, "version": VERSION, **asdict(thresholds)}), "ascii")
        partial.replace(target)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(target)) from problem
    finally:
        partial.unlink(missing_ok=True)


def read_thresholds(path: str | os.PathLike[str]) -> Thresholds:
    """Reads a thresholds file strictly. Raises UsageError naming the file and the field that is missing or wrong."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: no such file; `flashsparse sparsity --save-thresholds FILE` writes one")
    try:
        return _read(Node.read(file)[0])
    except PackError as problem:
        raise UsageError(f"{problem}; expected what `flashsparse sparsity --save-thresholds` writes") from None


def _read(node: Node) -> Thresholds:
    node.equal("format", FORMAT)
    node.equal("version", VERSION)
    metric = node.choice("metric", tuple(METRICS))
    quantity = node.choice("quantity", QUANTITIES)
    if quantity != METRICS[metric]:
        node.fail("quantity", quantity, f"{METRICS[metric]!r}, which is what {metric} compares")
    model = _read_model(node.child("model"))
    found = Thresholds(
        quantity,
        metric,
        node.real("arg", zero=True),
        model,
        _numbers(node, "thresholds", model.layers),
        _numbers(node, "activation_ratio", model.layers, most=1.0),
        node.real("ppl_ratio"),
        _texts(node),
        node.integer("tokens", 1),
    )
    _refuse_rest(node)
    return found


def _read_model(node: Node) -> ModelShape:
    model = ModelShape(
        node.text("model_type"),
        node.integer("hidden_size", 1),
        node.integer("intermediate_size", 1),
        node.integer("layers", 1),
        node.choice("activation", ACTIVATIONS),
    )
    _refuse_rest(node)
    return model


def _texts(node: Node) -> tuple[str, ...]:
    found = node.sha256_set("texts")
    if not found:
        node.fail("texts", [], "the SHA-256 digest of at least one text")
    return found


def _refuse_rest(node: Node) -> None:
    for key in sorted(node.left):
        node.fail(key, node.value[key], "no field of this name")


def _numbers(node: Node, key: str, count: int, most: float = math.inf) -> tuple[float, ...]:
    """A list of `count` finite numbers from 0 to `most`."""
    found: Any = node.take(key)
    if not isinstance(found, list) or len(found) != count:
        node.fail(key, found, f"a list of {count} numbers, one per layer")
    for index, value in enumerate(found):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= most or not math.isfinite(value):
            node.fail(f"{key}[{index}]", value, "a finite number >= 0" + ("" if most == math.inf else f", <= {most:g}"))
    return tuple(float(value) for value in found)
