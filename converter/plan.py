"""What a conversion will write: which tensors go where, in which type, and the exact size of every file.

Pure arithmetic on headers and the configuration: no weights are read, nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.predict import Fitted, make_recipe
from converter.predict_fit import Recipe
from converter.predict_options import PredictOptions
from converter.source import Checkpoint, SourceTensor
from converter.tensors import canonical, check_tensors
from flashsparse.errors import CheckpointError, UnsupportedModelError, UsageError
from flashsparse.models.config import NormalizedModel, normalize_config
from flashsparse.models.tensors import (
    HEAD,
    Stored,
    can_quantize,
    embedding_name,
    expected_shapes,
    has_output_bias,
    record_tensors,
    scoring_name,
    stored_as,
)
from flashsparse.pack.codec import CODECS, flash_tensors
from flashsparse.pack.gate_copy import copy_tensors
from flashsparse.pack.layout import Quant, Record, default_prefill_chunk, flash_name, record_layout
from flashsparse.pack.manifest import CONFIG, PREDICTOR, RESIDENT, FileEntry, Manifest, canonical_json
from flashsparse.pack.order import ORDER, TENSOR
from flashsparse.pack.safetensors import ALIGN, header_bytes, shape_bytes, storage_order

if TYPE_CHECKING:
    from converter.density import DensityOptions
    from converter.order import OrderOptions, Orders
    from flashsparse.pack.activity import ActivitySpec

BITS = (4, 8, 16)
GROUP_SIZES = (32, 64, 128)
TIERS = ("auto", "exact", "predict", "dense")
GATES = ("full", "compact")
EMBEDDING_BITS = 8  # embeddings and head lose more than other matrices below 8 bits


@dataclass(frozen=True)
class Options:
    """What the user chose. `tier` may be auto; `activation` overrides the configuration's; `predict` is its tier's."""

    bits: int = 16
    group_size: int = 64
    tier: str = "auto"
    gate: str = "full"
    activation: str | None = None
    predict: PredictOptions | None = None
    order: OrderOptions | None = None
    codec: str | None = None
    density: DensityOptions | None = None

    def __post_init__(self) -> None:
        choices = {"bits": BITS, "group_size": GROUP_SIZES, "tier": TIERS, "gate": GATES, "codec": (None, *CODECS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise UsageError(f"{name}: found {getattr(self, name)!r}, expected one of {expected}")


@dataclass(frozen=True)
class Plan:
    """A conversion with every choice made. `sources` are the checkpoint's tensors by canonical name.

    In tier predict `recipe` says how the predictor is made, and `predictor` is None until it is there; `ordering` and
    `orders` are the same for records that are reordered, `density` and `activity` for what slots are divided by.
    """

    model: NormalizedModel
    tier: str
    quant: Quant | None
    source_dtype: str
    sources: Mapping[str, SourceTensor]
    shapes: Mapping[str, tuple[int, ...]]
    copies: tuple[Path, ...]
    recipe: Recipe | None = None
    predictor: Fitted | None = None
    ordering: OrderOptions | None = None
    orders: Orders | None = None
    layout: str = "full"
    codec: str | None = None
    density: DensityOptions | None = None
    activity: ActivitySpec | None = None

    @property
    def gate(self) -> str:
        """Where the scoring matrix is: "full", resident; "compact", in the records and a copy of it resident; "none",
        in the records."""
        if self.tier == "exact":
            return self.layout
        return "full" if self.recipe and self.recipe.score == "gate" else "none"

    @property
    def records(self) -> int:
        """Records per layer: one for each neuron."""
        return self.model.intermediate_size

    @property
    def config_text(self) -> bytes:
        return canonical_json(self.model.config).encode()

    def small_files(self) -> dict[str, Callable[[], bytes]]:
        """Name -> contents of the configuration and of the tokenizer files."""
        return {CONFIG: lambda: self.config_text} | {path.name: path.read_bytes for path in self.copies}

    @cached_property
    def record(self) -> Record:
        model, names = self.model, record_tensors(self.model.family, 0)
        biases = names.get("gate_bias") in self.shapes, names["up_bias"] in self.shapes
        return record_layout(
            model.gated, self.tier, model.hidden_size, self.source_dtype, self.quant, *biases, self.gate
        )

    @property
    def flash_tensors(self) -> Stored:
        """Name -> (type, shape) of the tensors of each layer's file."""
        return flash_tensors(self.records, self.record.stride, self.codec)

    def record_sources(self, layer: int) -> dict[str, SourceTensor]:
        """Field of a record -> the tensor it comes from, in the record's order."""
        tensors = record_tensors(self.model.family, layer)
        return {field: self.sources[tensors[field]] for field in self.record.fields}

    @cached_property
    def resident_quant(self) -> dict[str, Quant]:
        """Base name -> quantization of every resident matrix that is quantized."""
        if self.quant is None:
            return {}
        embeddings = {embedding_name(self.model.family), HEAD}
        result = {}
        for name in self.resident_sources:
            if can_quantize(name, self.shapes[name]):
                bits = max(self.quant.bits, EMBEDDING_BITS) if name in embeddings else self.quant.bits
                result[name.removesuffix(".weight")] = Quant(bits, self.quant.group_size)
        return result

    @cached_property
    def resident_sources(self) -> dict[str, SourceTensor]:
        """The tensors that stay in memory: all that are not part of a record."""
        in_records = {
            tensor.info.name for layer in range(self.model.layers) for tensor in self.record_sources(layer).values()
        }
        resident = {name for name in self.shapes if self.sources[name].info.name not in in_records}
        resident |= {f"{base}.bias" for base in self.gate_copies if f"{base}.bias" in self.shapes}
        return {name: self.sources[name] for name in self.shapes if name in resident}

    @cached_property
    def gate_copies(self) -> dict[str, SourceTensor]:
        """Base name -> source of every matrix that a compact copy is resident of."""
        if self.gate != "compact":
            return {}
        family, layers = self.model.family, range(self.model.layers)
        return {base: self.sources[f"{base}.weight"] for base in (scoring_name(family, layer) for layer in layers)}

    @cached_property
    def resident_tensors(self) -> Stored:
        """Name -> (type, shape) of the resident file's tensors in the order of the file."""
        tensors: Stored = {}
        for name, source in self.resident_sources.items():
            quant = self.resident_quant.get(name.removesuffix(".weight"))
            matrix = can_quantize(name, source.shape)
            tensors |= stored_as(name, source.dtype, source.shape, quant if matrix else None)
        for base, source in self.gate_copies.items():
            tensors |= copy_tensors(base, *source.shape)
        return {name: tensors[name] for name in storage_order(tensors)}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of every file but the manifest, in the order in which they are written."""
        sizes = {CONFIG: len(self.config_text)} | {path.name: path.stat().st_size for path in self.copies}
        flash = ALIGN + sum(shape_bytes(*tensor) for tensor in self.flash_tensors.values())
        sizes |= {flash_name(n): flash for n in range(self.model.layers)}
        resident = sum(shape_bytes(*tensor) for tensor in self.resident_tensors.values())
        sizes |= {RESIDENT: len(header_bytes(self.resident_tensors)) + resident}
        if self.ordering is not None:
            table = {TENSOR: ("I32", (self.model.layers, self.records))}
            sizes |= {ORDER: len(header_bytes(table)) + 4 * self.model.layers * self.records}
        predictor = 0 if self.predictor is None else self.predictor.file_bytes
        return sizes | ({PREDICTOR: predictor} if predictor else {})

    def manifest(self, path: Path, files: Mapping[str, FileEntry]) -> Manifest:
        model = self.model
        return Manifest(
            path=path,
            family=model.family,
            tier=self.tier,
            gate=self.gate,
            gated=model.gated,
            activation=model.activation,
            layers=model.layers,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            source_dtype=self.source_dtype,
            quant=self.quant,
            resident_quant=self.resident_quant,
            record=self.record,
            prefill_chunk=default_prefill_chunk(model.hidden_size),
            files=dict(files),
            predictor=None if self.predictor is None else self.predictor.spec,
            order=None if self.orders is None else self.orders.spec,
            codec=self.codec,
            activity=self.activity,
        )

    def choices(self) -> dict[str, Any]:
        """The options as the journal keeps them: resolved, so that `auto` and what it chose are the same."""
        return {
            "bits": self.quant.bits if self.quant else 16,
            "group-size": self.quant.group_size if self.quant else None,
            "tier": self.tier,
            "activation": vars(self.model.activation),
            **({"gate": self.gate} if self.gate == "compact" else {}),
            **({} if self.recipe is None else self.recipe.options.choices()),
            **({} if self.ordering is None else self.ordering.choices()),
            **({} if self.codec is None else {"codec": self.codec}),
            **({} if self.density is None else self.density.choices()),
        }


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Checks a checkpoint against its configuration and decides everything.

    Raises UnsupportedModelError, CheckpointError or UsageError for what cannot be converted.
    """
    model = normalize_config(checkpoint.config, options.activation)
    config = model.config
    sources = canonical(model.family, checkpoint.tensors)
    shapes = expected_shapes(model.family, config, has_output_bias(model.source_model_type))
    tied = bool(config["tie_word_embeddings"])
    dtype = check_tensors(sources, shapes, tied, str(checkpoint.directory))
    if tied and HEAD in sources:
        _check_tied(checkpoint, sources[embedding_name(model.family)], sources[HEAD])
    quant = None if options.bits == 16 else Quant(options.bits, options.group_size)
    plan = Plan(
        model=model,
        tier=choose_tier(options.tier, model),
        quant=quant,
        source_dtype=dtype,
        sources=sources,
        shapes=shapes,
        copies=tuple(checkpoint.copies()),
        ordering=options.order,
        layout=options.gate,
        codec=options.codec,
        density=options.density,
    )
    _check_gate(options, plan)
    _check_codec(plan)
    if options.predict is not None:
        plan = _predicting(plan, options.predict, options.activation)
    _check_record_types(plan)
    check_groups(plan)
    return plan


def _predicting(plan: Plan, options: PredictOptions, activation: str | None) -> Plan:
    """The plan with its recipe, which knows what a layer takes with the gate among the records."""
    recipe = make_recipe(options, plan.model, plan.records * plan.record.bytes, activation)
    return replace(plan, recipe=recipe)


def choose_tier(asked: str, model: NormalizedModel) -> str:
    sparse = model.activation.name != "silu"
    if asked == "exact" and not sparse:
        raise UnsupportedModelError(
            "tier exact needs an activation with exact zeros (relu, relu2, fatrelu, drelu), but this model's is silu: "
            "every neuron is active; use --tier dense, or --activation if the configuration is wrong about it"
        )
    return asked if asked != "auto" else "exact" if sparse else "dense"


def _check_gate(options: Options, plan: Plan) -> None:
    if options.gate != "compact":
        return
    if plan.tier != "exact":
        raise UsageError(f"--gate compact is a layout of tier exact, not of tier {plan.tier}; leave it out")
    if plan.quant is not None:
        raise UsageError(
            f"--gate compact copies a gate of 16 bits in 12.25; with --bits {plan.quant.bits} the gate itself is "
            "smaller: leave it out"
        )


def _check_codec(plan: Plan) -> None:
    if plan.codec is not None and (plan.quant is not None or plan.source_dtype == "F32"):
        found = plan.source_dtype if plan.quant is None else f"--bits {plan.quant.bits}"
        raise UsageError(f"--codec {plan.codec} is for records of 16-bit floats, but found {found}; leave it out")


def _check_tied(checkpoint: Checkpoint, embedding: SourceTensor, head: SourceTensor) -> None:
    """A tied checkpoint may carry the head a second time, but then with the same bytes."""
    same = (embedding.dtype, embedding.shape) == (head.dtype, head.shape)
    rows = head.shape[0] if same else 0
    step = max(1, rows * (8 << 20) // max(1, head.info.nbytes))
    for begin in range(0, rows, step):
        parts = [checkpoint.rows(tensor, begin, min(rows, begin + step)).tobytes() for tensor in (embedding, head)]
        same = same and parts[0] == parts[1]
    if not same:
        raise CheckpointError(
            f"{head.path}: tensor {head.info.name!r}: differs from the embedding, "
            "but config.json says tie_word_embeddings true; correct the configuration or remove the tensor"
        )


def _check_record_types(plan: Plan) -> None:
    for layer in range(plan.model.layers):
        for tensor in plan.record_sources(layer).values():
            if tensor.dtype != plan.source_dtype:
                raise CheckpointError(
                    f"{tensor.path}: tensor {tensor.info.name!r}: found type {tensor.dtype}, "
                    f"expected {plan.source_dtype} as the weights have"
                )


def check_groups(plan: Plan) -> None:
    """Every quantized row must be made of whole groups."""
    if plan.quant is None:
        return
    columns = {"hidden_size": plan.model.hidden_size}
    columns |= {f"{base}.weight": plan.shapes[f"{base}.weight"][1] for base in plan.resident_quant}
    for name, size in columns.items():
        if size % plan.quant.group_size:
            fitting = [str(g) for g in GROUP_SIZES if all(n % g == 0 for n in columns.values())]
            hint = f"--group-size {' or '.join(fitting)}" if fitting else "--bits 16"
            raise UsageError(
                f"group size {plan.quant.group_size} does not divide {name} (rows of {size} values); use {hint}"
            )
