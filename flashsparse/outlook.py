"""What speed to expect of a model on a drive and a memory, before it runs: two limits, and what was assumed for them.

Arithmetic on sizes and measured rates. A step reads the records that are missing from its slots and touches every byte
that it computes with; where both run at the same time the slower one decides. Nothing else is counted: not sampling,
bookkeeping, or the KV cache, which are small beside them for one conversation of a few thousand tokens.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashsparse.errors import CheckpointError, UsageError, format_bytes

if TYPE_CHECKING:
    from flashsparse.flash.curve import Curve

ASSUMED_DENSITY = 0.1
ASSUMED_HITS = 0.85  # published for 7B models with a window of a few tokens: 0.82 to 0.90
BESIDE = 64_000_000  # KV cache and buffers of a model that is not converted yet
SLOTS_KEPT = 0.999


@dataclass(frozen=True)
class Shape:
    """What a token needs. Bytes; `touched`: resident weights that each token is computed with, predictor included.

    `row`: of the embedding, read before anything is computed; 0 where the embedding is in memory.
    """

    name: str
    tier: str
    layers: int
    records: int  # of one layer
    record_bytes: int
    stride: int
    resident: int
    touched: int
    slots: float  # of one layer, in the mean
    density: float | None = None  # as calibrated
    stored: int | None = None  # bytes of a compressed record on flash
    row: int = 0


@dataclass(frozen=True)
class Outlook:
    """Seconds and bytes of one decoded token. `tokens_per_second` is what both limits together allow."""

    density: float
    density_from: str
    hit_rate: float
    hit_rate_from: str
    read_bytes: int
    read_s: float
    touched_bytes: int
    memory_s: float
    tokens_per_second: float
    rule: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def expect(shape: Shape, curve: Curve, memory_rate: float, density: float | None, hit_rate: float | None) -> Outlook:
    """The limits of `shape`; `density` (0 to 1) and `hit_rate` where the user knows better. memory_rate: bytes/s."""
    share, share_from = _density(shape, density)
    hits, hits_from = _hit_rate(shape, share, hit_rate)
    needed = shape.layers * shape.records * share
    whole = shape.tier == "dense" or share == 1
    size = shape.record_bytes if shape.stored is None or whole else shape.stored
    rate = curve.sequential if whole else curve.best(size)
    read_bytes = needed * (1 - hits) * size
    read_s = read_bytes / rate
    touched = shape.touched + needed * shape.record_bytes
    memory_s = touched / memory_rate
    if shape.tier == "exact":  # hits are computed while the misses are read, and nothing else is
        total = read_s + memory_s - min(read_s, needed * hits * shape.record_bytes / memory_rate)
        rule = "reading and memory time, less the hits' computing"
    else:
        total, rule = max(read_s, memory_s), "the larger of the two: reads run under computing"
    row_s = shape.row / (curve.at(shape.row, 1, curve.mode) or rate) if shape.row else 0.0
    read_bytes += shape.row
    read_s, total = read_s + row_s, total + row_s
    return Outlook(
        share, share_from, hits, hits_from, round(read_bytes), read_s, round(touched), memory_s, 1 / total, rule
    )


def _density(shape: Shape, given: float | None) -> tuple[float, str]:
    if shape.tier == "dense":
        return 1.0, "tier dense computes every neuron"
    if given is not None:
        return given, "--density"
    if shape.density is not None:
        return shape.density, "as calibrated"
    return ASSUMED_DENSITY, "assumed; set it with --density"


def _hit_rate(shape: Shape, density: float, given: float | None) -> tuple[float, str]:
    if given is not None:
        return given, "--hit-rate"
    if shape.slots >= shape.records * SLOTS_KEPT:
        return 1.0, "every record has a slot"
    if shape.tier == "dense" or shape.slots < shape.records * density:
        return 0.0, "the slots hold less than one token's set"
    return ASSUMED_HITS, "assumed, as published for 7B models; set it with --hit-rate"


def pack_shape(pack: Path, dram: str | None) -> Shape:
    """The shape of a pack under a budget. Raises PackError, BudgetError and UsageError as loading it would."""
    from flashsparse import memory
    from flashsparse.flash import FlashFile
    from flashsparse.pack.inspect import describe
    from flashsparse.pack.manifest import Manifest
    from flashsparse.rows import embedding_bytes
    from flashsparse.sizes import Sizes

    facts, m = describe(pack), Manifest.load(pack)
    budget = None if dram is None else memory.budget_bytes(dram)
    files = [FlashFile(m.flash_path(layer)) for layer in range(m.layers)]
    try:
        plan, _ = Sizes(m, files, m.tier, 1, 16).plan(memory.footprint(), budget, None, None)
    finally:
        for file in files:
            file.close()
    sizes, whole = facts["bytes"], embedding_bytes(m)
    lookups = 0 if m.config.get("tie_word_embeddings") else sizes["resident_embeddings"]
    return Shape(
        name=str(pack),
        tier=m.tier,
        layers=m.layers,
        records=m.intermediate_size,
        record_bytes=m.record.bytes,
        stride=m.record.stride,
        resident=sizes["resident"] - plan.on_flash + sizes["predictor"],
        touched=sizes["resident"] - lookups + sizes["predictor"],
        slots=sum(plan.slots) / m.layers,
        density=m.predictor.calibrated_density if m.predictor else m.activity.density if m.activity else None,
        stored=None if m.codec is None else round(m.record.bytes / facts["codec"]["ratio"]),
        row=whole // m.vocab_size if plan.on_flash else 0,
    )


def checkpoint_shape(source: Path, dram: str | None, tier: str, bits: int) -> Shape:
    """The shape that a checkpoint's config.json would have as a pack of `tier` and `bits`; an estimate.

    Raises CheckpointError, UnsupportedModelError, UsageError.
    """
    from flashsparse import memory
    from flashsparse.models.config import normalize_config
    from flashsparse.pack.layout import Quant, record_layout, vector_bytes

    try:
        raw = json.loads((source / "config.json").read_text())
        model = normalize_config(raw)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}/config.json: cannot be read: {error}") from None
    d, quant = model.hidden_size, None if bits == 16 else Quant(bits, 64)
    record = record_layout(model.gated, tier, d, "F16", quant)

    def row(stored: Quant | None) -> int:
        return vector_bytes(d, "F16", stored)

    heads = model.heads * model.head_dim
    attention = model.layers * (2 * heads + 2 * model.kv_heads * model.head_dim) * row(quant)
    head = model.vocab_size * row(quant)
    embeddings = 0 if model.config.get("tie_word_embeddings") else head
    scored = {"exact": row(quant), "predict": row(Quant(2, 64)), "dense": 0}[tier]
    touched = attention + head + model.layers * model.intermediate_size * scored
    every = model.layers * model.intermediate_size
    needs = touched + embeddings + BESIDE + every * record.stride
    budget = memory.default_budget(needs, 0)
    if dram is not None:
        budget = memory.budget_bytes(dram)
    on_flash = budget < needs and embeddings > 0
    resident = touched if on_flash else touched + embeddings
    room = budget - resident - BESIDE
    if room < 0:
        raise UsageError(
            f"--dram {dram}: resident weights and buffers take about {format_bytes(resident + BESIDE)}; give more"
        )
    slots = 0 if tier == "dense" else min(model.intermediate_size, room // record.stride / model.layers)
    return Shape(
        f"{source}, estimated from its config.json", tier, model.layers, model.intermediate_size, record.bytes,
        record.stride, resident, touched, slots, row=row(quant) if on_flash else 0,
    )  # fmt: skip
