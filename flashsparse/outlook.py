"""What speed to expect of a model on a drive and a memory, before it runs: two limits, and what was assumed for them.

Arithmetic on sizes and measured rates. A step reads the records that are missing from its slots and touches every byte
that it computes with; where both run at the same time the slower one decides. Nothing else is counted: not sampling,
bookkeeping, or the KV cache, which are small beside them for one conversation of a few thousand tokens.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashsparse.flash.curve import Curve
    from flashsparse.pack.manifest import Manifest

ASSUMED_DENSITY = 0.1
ASSUMED_HITS = 0.85  # published for 7B models with a window of a few tokens: 0.82 to 0.90
IO_THREADS = 16  # as without a curve
SLOTS_KEPT = 0.999


@dataclass(frozen=True)
class Shape:
    """What a token needs. Bytes; `touched`: resident weights that each token is computed with, predictor included.

    `row`: of the embedding, read before anything is computed; 0 where the embedding is in memory. `floor`: the smallest
    budget that works, `needs`: the one that holds everything, as the memory plan states them.
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
    floor: int = 0
    needs: int = 0


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
    from flashsparse.pack.codec import compression
    from flashsparse.pack.manifest import Manifest

    m = Manifest.load(pack)
    ratio = None if m.codec is None else compression(m)
    return _shape(str(pack), m, [m.flash_path(layer) for layer in range(m.layers)], dram, ratio)


def checkpoint_shape(source: Path, expected: Manifest, dram: str | None) -> Shape:
    """The shape of the pack that a checkpoint would become, beside it. Raises BudgetError, UsageError."""
    from flashsparse.pack.manifest import CONFIG

    return _shape(f"{source}, estimated from its config.json", expected, [source / CONFIG], dram, None)


def _shape(name: str, m: Manifest, paths: list[Path], dram: str | None, ratio: float | None) -> Shape:
    """By the memory plan's own figures; `paths` are read as the records are, or lie where they would."""
    from flashsparse import memory
    from flashsparse.flash import FlashFile
    from flashsparse.kernels import resolve
    from flashsparse.pack.manifest import PREDICTOR, RESIDENT
    from flashsparse.rows import embedding_bytes
    from flashsparse.sizes import Sizes

    budget, kernels = None if dram is None else memory.budget_bytes(dram), resolve("auto")
    with ExitStack() as stack:
        files = [stack.enter_context(FlashFile(path)) for path in paths]
        sizes = Sizes(m, files, m.tier, os.cpu_count() or 1, IO_THREADS, kernels == "metal", kernels == "native")
        plan, _ = sizes.plan(memory.footprint(), budget, None, None)
    embedding = embedding_bytes(m)  # 0 when the head is tied to it: each token needs it whole
    predictor = m.files[PREDICTOR].bytes if PREDICTOR in m.files else 0
    resident = m.files[RESIDENT].bytes + predictor
    return Shape(
        name=name,
        tier=m.tier,
        layers=m.layers,
        records=m.intermediate_size,
        record_bytes=m.record.bytes,
        stride=m.record.stride,
        resident=resident - plan.on_flash,
        touched=resident - embedding,
        slots=sum(plan.slots) / m.layers,
        density=m.predictor.calibrated_density if m.predictor else m.activity.density if m.activity else None,
        stored=None if ratio is None else round(m.record.bytes / ratio),
        row=embedding // m.vocab_size if plan.on_flash else 0,
        floor=plan.floor,
        needs=plan.needs_all,
    )
