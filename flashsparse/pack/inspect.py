"""What a pack is, in numbers: shapes, tier, bytes per part, parameters in total and activated per token.

Parameters are counted as TurboSparse counts them: a neuron is its gate row, up row and down column, and a token
activates (share of active neurons) x (FFN parameters). That an exact pack scores every gate row is left out of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from flashsparse.errors import PackError
from flashsparse.pack.codec import compression
from flashsparse.pack.layout import Quant, Record, flash_name
from flashsparse.pack.manifest import CONFIG, FORMAT, MANIFEST, PREDICTOR, RESIDENT, VERSION, Manifest
from flashsparse.pack.order import ORDER, read_orders
from flashsparse.pack.predictor import check_predictor, predictor_quant
from flashsparse.pack.safetensors import ALIGN, Header, read_header

DENSITIES = (0.05, 0.1, 0.2)
SECTORS = (512, 4096)


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model. `other` is norms and the down projection's bias, `ffn` is the neurons'."""

    embeddings: int = 0
    head: int = 0
    attention: int = 0
    ffn: int = 0
    other: int = 0
    predictors: int = 0

    @property
    def total(self) -> int:
        return self.embeddings + self.head + self.attention + self.ffn + self.other + self.predictors

    def activated(self, density: float, embeddings: bool = True, predictors: bool = True) -> int:
        """Parameters that one token uses when the share `density` (0..1) of the neurons is active."""
        count = self.attention + self.other + round(density * self.ffn)
        if embeddings:
            count += self.embeddings + self.head
        return count + self.predictors if predictors else count


def part_of(name: str) -> str:
    """The part a resident tensor belongs to: embeddings, head, attention, ffn (scoring), or other."""
    base = name.rsplit(".", 1)[0]
    last = base.rsplit(".", 1)[-1]
    if last in ("embed_tokens", "embed_positions", "project_in"):
        return "embeddings"
    if last in ("lm_head", "project_out"):
        return "head"
    if ".self_attn." in name:
        return "attention"
    if last in ("gate_proj", "fc1"):
        return "ffn"
    return "other"


def tensor_parameters(name: str, shape: tuple[int, ...], resident_quant: Mapping[str, Quant]) -> int:
    """Parameters of a resident tensor: of a quantized matrix its weights, not its scales and biases."""
    base, _, kind = name.rpartition(".")
    quant = resident_quant.get(base)
    if quant is None or kind == "bias":
        return math.prod(shape)
    return math.prod(shape) * 32 // quant.bits if kind == "weight" else 0


def count_parameters(
    shapes: Mapping[str, tuple[int, ...]],
    resident_quant: Mapping[str, Quant],
    record: Record,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
) -> Parameters:
    """Counts a pack's parameters from its resident tensors' shapes and the fields of its records."""
    counts = dict.fromkeys(("embeddings", "head", "attention", "ffn", "other"), 0)
    for name, shape in shapes.items():
        counts[part_of(name)] += tensor_parameters(name, shape, resident_quant)
    neuron = sum(hidden_size if field.kind == "vector" else 1 for field in record.fields.values())
    counts["ffn"] += neuron * intermediate_size * layers
    return Parameters(**counts)


def read_amplification(record: Record, sector: int) -> float:
    """Mean bytes a direct read of one record moves, over the record's bytes, when reads are rounded out to sectors."""
    period = sector // math.gcd(sector, record.stride)
    moved = 0
    for index in range(period):
        begin = ALIGN + index * record.stride
        moved += -(-(begin + record.bytes) // sector) * sector - begin // sector * sector
    return moved / (period * record.bytes)


def describe(pack_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything `info` prints, as plain JSON values. Raises PackError for a pack this version cannot read."""
    manifest = Manifest.load(pack_dir)
    header = read_header(manifest.resident_path, PackError)
    predictor = _predictor_shapes(manifest)
    config = manifest.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "digest": manifest.digest,
        "family": manifest.family,
        "source_model_type": config.get("source_model_type", manifest.family),
        "tier": manifest.tier,
        "gate": manifest.gate,
        "activation": asdict(manifest.activation),
        "shapes": _shapes(manifest, config),
        "source_dtype": manifest.source_dtype,
        "quant": None if manifest.quant is None else asdict(manifest.quant),
        "resident_quant": {name: asdict(quant) for name, quant in sorted(manifest.resident_quant.items())},
        "record": _record(manifest.record),
        "prefill_chunk": manifest.prefill_chunk,
        "order": _order(manifest),
        "activity": None if manifest.activity is None else manifest.activity.to_dict(),
        "codec": None if manifest.codec is None else {"name": manifest.codec, "ratio": compression(manifest)},
        "predictor": _predictor(manifest),
        "bytes": _bytes(manifest, header),
        **_parameters(manifest, header, predictor),
    }


def _order(manifest: Manifest) -> dict[str, Any] | None:
    """How records are ordered, once the order itself is checked; None in source order."""
    read_orders(manifest)
    return None if manifest.order is None else manifest.order.to_dict()


def _predictor_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """The tensors of the predictor file, when the pack has one."""
    if PREDICTOR not in manifest.files:
        return {}
    header = read_header(manifest.predictor_path, PackError)
    check_predictor(manifest, header)
    return {name: info.shape for name, info in header.tensors.items()}


def _predictor(manifest: Manifest) -> dict[str, Any] | None:
    """How neurons are predicted and what calibration measured, layers summed up; None in the other tiers."""
    spec = manifest.predictor
    if spec is None:
        return None
    measured = ("density", "value_recall", "recall")
    every = [index for index, layer in enumerate(spec.layers) if layer.every]
    return {
        "score": spec.score,
        "selection": spec.selection,
        "target": spec.target,
        "target_value": spec.target_value,
        "texts": list(spec.texts),
        "tokens": spec.tokens,
        "bits": sorted({layer.bits for layer in spec.layers if layer.bits is not None}),
        "ranks": sorted({layer.rank for layer in spec.layers if layer.rank is not None}),
        "whole_layers": every,
        "calibrated_density": spec.calibrated_density,
        **{name: _range([getattr(layer, name) for layer in spec.layers if not layer.every]) for name in measured},
        "layers": [layer.to_dict() for layer in spec.layers],
    }


def _range(values: list[float | None]) -> dict[str, float] | None:
    """Least, mean and most over the layers; None when a layer was not measured."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return {"least": min(known), "mean": sum(known) / len(known), "most": max(known)}


def _shapes(manifest: Manifest, config: dict[str, Any]) -> dict[str, Any]:
    names = ("layers", "hidden_size", "intermediate_size", "vocab_size", "heads", "kv_heads", "head_dim")
    shapes = {name: getattr(manifest, name) for name in names}
    for name in ("max_position_embeddings", "sliding_window", "tie_word_embeddings"):
        shapes[name] = config.get(name)
    return shapes


def _record(record: Record) -> dict[str, Any]:
    return {
        "bytes": record.bytes,
        "stride": record.stride,
        "padding_bytes": record.stride - record.bytes,
        "stride_amplification": record.stride / record.bytes,
        "direct_read_amplification": {str(sector): read_amplification(record, sector) for sector in SECTORS},
        "fields": [asdict(field) for field in record.fields.values()],
    }


def _bytes(manifest: Manifest, header: Header) -> dict[str, int]:
    parts = dict.fromkeys(("embeddings", "head", "attention", "ffn", "other"), 0)
    for name, info in header.tensors.items():
        parts[part_of(name)] += info.nbytes
    flash = sum(manifest.files[flash_name(layer)].bytes for layer in range(manifest.layers))
    resident = manifest.files[RESIDENT].bytes
    predictor = manifest.files[PREDICTOR].bytes if PREDICTOR in manifest.files else 0
    order = manifest.files[ORDER].bytes if ORDER in manifest.files else 0
    rest = sum(entry.bytes for entry in manifest.files.values()) - flash - resident - predictor - order
    text = (manifest.path / MANIFEST).stat().st_size
    return {
        "flash": flash,
        "flash_per_layer": flash // manifest.layers,
        "resident": resident,
        **{f"resident_{part}": count for part, count in parts.items()},
        "predictor": predictor,
        "config": manifest.files[CONFIG].bytes,
        "tokenizer": rest - manifest.files[CONFIG].bytes,
        "manifest": text,
        **({"order": order} if order else {}),
        "total": flash + resident + predictor + order + rest + text,
    }


def _parameters(manifest: Manifest, header: Header, predictor: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    copied = {name.removesuffix(".high") for name in header.tensors if name.endswith(".high")}  # records hold these too
    shapes = {name: t.shape for name, t in header.tensors.items() if name.rpartition(".")[0] not in copied}
    counts = count_parameters(
        shapes,
        manifest.resident_quant,
        manifest.record,
        manifest.hidden_size,
        manifest.intermediate_size,
        manifest.layers,
    )
    quant = predictor_quant(manifest)
    counts = replace(counts, predictors=sum(tensor_parameters(name, shape, quant) for name, shape in predictor.items()))
    without = counts.total - counts.embeddings - counts.head
    return {
        "parameters": asdict(counts) | {"total": counts.total, "total_without_embeddings": without},
        "activated_per_token": _activated(manifest, counts),
    }


def _activated(manifest: Manifest, counts: Parameters) -> dict[str, Any]:
    """Per-token counts. Which share of the neurons is active is known of a dense pack (all) and after calibration."""
    known = 1.0 if manifest.tier == "dense" else manifest.predictor.calibrated_density if manifest.predictor else None
    densities = DENSITIES if known is None else (known,)
    return {
        "active_density": known,
        "per_percent_of_neurons": round(counts.ffn / 100),
        "at_density": [
            {
                "density": density,
                "all": counts.activated(density),
                "without_embeddings": counts.activated(density, embeddings=False),
                "without_predictors": counts.activated(density, predictors=False),
                "without_both": counts.activated(density, embeddings=False, predictors=False),
            }
            for density in densities
        ],
    }
