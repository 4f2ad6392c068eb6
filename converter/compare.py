"""Whether a pack that exists is what a conversion would make. Shapes, options and small files are compared whole.

Weights are compared in samples, so that a finished conversion of many gigabytes is recognized at once; `verify` checks
that the pack's bytes are what was written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from converter.bundles import records
from converter.density import published_activity
from converter.gate_copy import copy_rows
from converter.order import published_orders
from converter.plan import Plan
from converter.predict import published
from converter.quantize import quantize_rows
from converter.source import Checkpoint, SourceTensor
from flashsparse.errors import PackError
from flashsparse.pack.codec import whole_records
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.safetensors import Header, read_header, read_tensor


def difference(checkpoint: Checkpoint, plan: Plan, dst: Path) -> str:
    """The first thing in the pack at `dst` that differs from the plan and the checkpoint, "" when nothing does."""
    try:
        found = Manifest.load(dst)
        text, plan = published_orders(plan, found)
        if text:
            return text
        text, plan = published_activity(plan, found)
        if text:
            return text
        text, plan = _predictor(checkpoint, plan, found)
        text = text or _facts(plan, found)
        return text or _records(checkpoint, plan, found) or _resident(checkpoint, plan, found)
    except PackError as problem:
        return str(problem)


def _predictor(checkpoint: Checkpoint, plan: Plan, found: Manifest) -> tuple[str, Plan]:
    """In tier predict the plan with the pack's own predictor, if it is of the kind and the text that were asked for."""
    if plan.recipe is None:
        return "", plan
    text, predictor = published(plan.recipe, checkpoint.directory, found)
    return text, replace(plan, predictor=predictor)


def _facts(plan: Plan, found: Manifest) -> str:
    for name, value in vars(plan.manifest(found.path, found.files)).items():
        if getattr(found, name) != value:
            return f"{name}: found {getattr(found, name)!r}, expected {value!r}"
    sizes = {name: entry.bytes for name, entry in found.files.items()}
    for name in sorted(set(sizes) | set(plan.sizes)):
        if sizes.get(name) != plan.sizes.get(name):
            return f"{name}: found {sizes.get(name, 'no')} bytes, expected {plan.sizes.get(name, 'no')}"
    for name, contents in plan.small_files().items():
        if (found.path / name).read_bytes() != contents():
            return f"{name}: its contents differ"
    return ""


def _records(checkpoint: Checkpoint, plan: Plan, found: Manifest) -> str:
    """Compares one record of the first, the middle and the last layer."""
    neuron = plan.records // 2
    for layer in sorted({0, plan.model.layers // 2, plan.model.layers - 1}):
        sources = plan.record_sources(layer)
        columns = checkpoint.columns(sources["down"], neuron, neuron + 1)
        expected = records(checkpoint, plan, sources, neuron, columns)
        ((_, stored),) = whole_records(found, layer, neuron, neuron + 1)
        if not np.array_equal(stored, expected):
            return f"{found.flash_path(layer).name}: record {neuron} differs from the source"
    return ""


def _resident(checkpoint: Checkpoint, plan: Plan, found: Manifest) -> str:
    """Compares the middle row of every resident tensor."""
    header = read_header(found.resident_path, PackError)
    for name, source in plan.resident_sources.items():
        if not _same_row(checkpoint, plan, header, name, source):
            return f"{found.resident_path.name}: tensor {name!r} differs from the source"
    for base, source in plan.gate_copies.items():
        if not _same_copy(checkpoint, header, base, source):
            return f"{found.resident_path.name}: the copy of {base!r} differs from the source"
    return ""


def _same_copy(checkpoint: Checkpoint, header: Header, base: str, source: SourceTensor) -> bool:
    row = source.shape[0] // 2
    parts = copy_rows(checkpoint.rows(source, row, row + 1), source.dtype)
    return all(read_tensor(header, f"{base}.{name}", row, 1).tobytes() == p.tobytes() for name, p in parts.items())


def _same_row(checkpoint: Checkpoint, plan: Plan, header: Header, name: str, source: SourceTensor) -> bool:
    row = source.shape[0] // 2 if len(source.shape) > 1 else 0
    count = 1 if len(source.shape) > 1 else source.shape[0]
    values = checkpoint.rows(source, row, row + count)
    base = name.removesuffix(".weight")
    quant = plan.resident_quant.get(base) if name.endswith(".weight") else None
    parts = {name: values}
    if quant is not None:
        words, scales, biases = quantize_rows(values, source.dtype, quant)
        parts = {name: words, f"{base}.scales": scales, f"{base}.biases": biases}
    # As bytes: NaN does not equal itself.
    return all(read_tensor(header, part, row, count).tobytes() == data.tobytes() for part, data in parts.items())
