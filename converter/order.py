"""`convert --order`: what was asked for, the collector that measures it, and the plan with its records reordered.

A reordered pack is the same model with the neurons of each layer renumbered, everywhere: records, resident gate rows,
predictor rows. So nothing at run time knows of it; only sums over neurons are added in another order than the source's.
The orders themselves are found by `ordering`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converter.calibrate import Collector, calibrate
from converter.disk import OutputFile
from converter.model import LayerWeights
from converter.ordering import coactivation_order, frequency_order, random_order
from converter.plan import Plan
from converter.predict_options import DEFAULT_TOKENS, Given
from converter.statistics import SAMPLED_TOKENS, Activity, activity_rule
from converter.walk import Block, Progress
from flashsparse.errors import CheckpointError, ConvertError, UsageError
from flashsparse.models.tensors import record_tensors
from flashsparse.pack.manifest import Activation, Manifest
from flashsparse.pack.order import KINDS, TENSOR, OrderSpec, read_orders
from flashsparse.pack.safetensors import header_bytes, read_header, read_tensor
from flashsparse.sparsity.calibration import TENSORS, read_description
from flashsparse.sparsity.texts import file_sha256, text_digests

SOURCE = "source"
MEASURED = ("frequency", "coactivation")
MAX_SEED = 2**63 - 1
TENSOR_NAME = "order"  # among a layer's calibration tensors


@dataclass(frozen=True)
class OrderOptions:
    """What to order by; `texts`, `tokens` and `window` only where it is measured."""

    kind: str
    seed: int | None = None
    texts: tuple[Path, ...] = ()
    tokens: int = 0
    window: int | None = None

    def choices(self) -> dict[str, Any]:
        """What a resumed conversion must agree on."""
        digests = [file_sha256(path) for path in self.texts]
        return {"order": [self.kind, self.seed, digests, self.tokens, self.window]}

    def spec(self, tokens: int) -> OrderSpec:
        return OrderSpec(self.kind, self.seed, text_digests(self.texts), tokens)


@dataclass(frozen=True)
class Orders:
    """Orders that were found: `orders` int32 [layers, I]."""

    spec: OrderSpec
    orders: npt.NDArray[np.int32]


def order_options(text: str, found: Given) -> OrderOptions | None:
    """`source` (None), frequency, coactivation, or random[:SEED]. Raises UsageError."""
    name, _, number = text.partition(":")
    if name not in (SOURCE, *KINDS) or (number and name != "random"):
        raise UsageError(f"--order {text!r}: expected source, frequency, coactivation or random[:SEED]")
    if name == SOURCE:
        return None
    if name in MEASURED:
        if not found.calibrate:
            raise UsageError(f"--order {name} needs --calibrate FILE: it is measured on a text")
        return OrderOptions(
            name, None, found.calibrate, found.calibrate_tokens or DEFAULT_TOKENS, found.calibrate_window
        )
    if number and not (number.isascii() and number.isdigit() and int(number) <= MAX_SEED):
        raise UsageError(f"--order {text!r}: found seed {number!r}, expected a number from 0 to 2^63 - 1")
    return OrderOptions(name, int(number or 0))


def without_texts(found: Given, options: OrderOptions | None, tier: str) -> Given:
    """The options that are for tier predict alone: in other tiers an order takes the texts."""
    if options is None or not options.texts or tier == "predict":
        return found
    return replace(found, calibrate=(), calibrate_tokens=None, calibrate_window=None)


def order_activity(options: OrderOptions, activation: Activation) -> Activity | None:
    """What counts as active; None for random. Raises UsageError where that is not defined."""
    if not options.texts:
        return None
    activity = activity_rule(activation)
    if activity is None:
        raise UsageError(
            f"--order {options.kind}: {activation.name} has no zeros that would tell which neurons are active"
        )
    return activity


class Ordering:
    """The collector that finds a layer's order, from at most SAMPLED_TOKENS sets, evenly spread and kept as bits."""

    name = "order"

    def __init__(self, options: OrderOptions, activity: Activity) -> None:
        self._options, self._activity = options, activity
        self._step = max(1, -(-options.tokens // SAMPLED_TOKENS))
        self._bits: list[npt.NDArray[np.uint8]] = []
        self._seen = self._neurons = 0

    def options(self) -> dict[str, Any]:
        return {"kind": self._options.kind}

    def begin(self, layer: int, weights: LayerWeights) -> None:
        self._bits, self._seen, self._neurons = [], 0, len(weights.up)

    def visit(self, block: Block) -> None:
        now = self._activity(block.gate)
        self._bits.append(np.packbits(now[-self._seen % self._step :: self._step], axis=1))
        self._seen += len(now)

    def output(self, block: Block, ffn: np.ndarray, after: np.ndarray) -> None:
        """Nothing of a layer's output is needed."""

    def end(self, layer: int) -> dict[str, np.ndarray]:
        active = np.unpackbits(np.concatenate(self._bits), axis=1, count=self._neurons).view(bool)
        find = frequency_order if self._options.kind == "frequency" else coactivation_order
        return {TENSOR_NAME: find(active)}


def find_orders(plan: Plan, source: Path, work: Path, override: str | None, progress: Progress | None) -> Orders:
    """Every layer's order. In tier predict the texts were walked already, and `work` has it.

    Raises what calibration raises, and OSError when writing fails.
    """
    options, layers = plan.ordering, plan.model.layers
    assert options is not None
    activity = order_activity(options, plan.model.activation)
    if activity is None:
        found = [random_order(plan.records, options.seed or 0, layer) for layer in range(layers)]
        return Orders(options.spec(0), np.stack(found))
    if plan.recipe is None:
        measured = Measured(options.texts, options.tokens, options.window)
        measure_texts(measured, [Ordering(options, activity)], source, work, override, progress)
    header = read_header(work / TENSORS, CheckpointError)
    found = [read_tensor(header, f"layers.{layer}.{TENSOR_NAME}") for layer in range(layers)]
    return Orders(options.spec(int(read_description(work)["tokens"])), np.stack(found))


@dataclass(frozen=True)
class Measured:
    """Texts to walk, how many of their tokens, and in which windows."""

    texts: tuple[Path, ...]
    tokens: int
    window: int | None


def measure_texts(
    measured: Measured,
    extra: Sequence[Collector],
    source: Path,
    work: Path,
    override: str | None,
    progress: Progress | None,
) -> None:
    """Walk the texts through the model, with `extra` collectors; results are left in `work`, and found there again."""
    try:
        calibrate(
            source,
            measured.texts,
            out=work,
            tokens=measured.tokens,
            window=measured.window,
            activation=override,
            progress=progress,
            extra=extra,
        )
    except ConvertError as problem:
        if isinstance(problem.__cause__, OSError):  # whoever converts says what is kept and how to go on
            raise problem.__cause__ from problem
        raise


def reordered(plan: Plan, orders: Orders) -> Plan:
    """The plan with everything that has a row (or column) for each neuron read in the new order."""
    sources = dict(plan.sources)
    for layer, order in enumerate(orders.orders):
        for field, name in record_tensors(plan.model.family, layer).items():
            if name in sources:
                sources[name] = replace(sources[name], order=order, axis=1 if field == "down" else 0)
    return replace(plan, sources=sources, orders=orders)


def published_orders(plan: Plan, found: Manifest) -> tuple[str, Plan]:
    """The plan with the order of a pack that exists, or how that differs from what was asked for."""
    if plan.ordering is None or found.order is None:
        asked = None if plan.ordering is None else plan.ordering.kind
        same = found.order is None and asked is None
        return "" if same else f"order: found {found.order and found.order.kind!r}, expected {asked!r}", plan
    expected = plan.ordering.spec(found.order.tokens)
    if found.order != expected:
        return f"order: found {found.order}, expected {expected}", plan
    orders = read_orders(found)
    assert orders is not None
    return "", reordered(plan, Orders(found.order, orders))


def write_orders(orders: Orders, file: OutputFile, advance: Callable[[int], None]) -> None:
    """Writes the order file; `advance` is told the bytes written."""
    for part in (header_bytes({TENSOR: ("I32", orders.orders.shape)}), orders.orders.astype("<i4").tobytes()):
        file.write(part)
        advance(len(part))
