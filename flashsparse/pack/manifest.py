"""The manifest of a pack (pack.json): its fields, the layout of a record, and the strict reader and writer.

`docs/format.md` is the specification. Nothing here reads weights; checksums of the data are checked by `verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flashsparse.errors import DamagedPackError, PackError
from flashsparse.pack.activity import ActivitySpec, read_activity
from flashsparse.pack.checks import Node, listed, shown
from flashsparse.pack.codec import CODECS, LENGTH_BYTES, flash_tensors
from flashsparse.pack.config import check_config
from flashsparse.pack.layout import (
    BLOCK_BYTES,
    FIELD_NAMES,
    Field,
    FileDigest,
    FileEntry,
    Quant,
    Record,
    block_records,
    default_prefill_chunk,
    flash_digest,
    flash_name,
    record_layout,
    resident_digest,
    vector_bytes,
)
from flashsparse.pack.order import ORDER, OrderSpec, read_order_spec
from flashsparse.pack.safetensors import ALIGN, Header, read_header
from flashsparse.sparsity.spec import PredictorSpec, Shape, read_spec

FORMAT = "flashsparse-pack"
VERSION = 1
MANIFEST = "pack.json"
CONFIG = "config.json"
RESIDENT = "resident.safetensors"
PREDICTOR = "predictor.safetensors"
FAMILIES = ("llama", "opt")
TIERS = ("exact", "predict", "dense")
GATES = ("full", "compact", "none")
ACTIVATIONS = ("silu", "relu", "relu2", "fatrelu", "drelu")
SOURCES = ("config", "option")
SOURCE_DTYPES = ("F32", "F16", "BF16")
BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
KINDS = ("vector", "scalar")
MAX_NAME_BYTES = 255

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Field",
    "FileDigest",
    "FileEntry",
    "Manifest",
    "Quant",
    "Record",
    "block_records",
    "canonical_json",
    "default_prefill_chunk",
    "flash_digest",
    "flash_name",
    "read_manifest",
    "record_layout",
    "resident_digest",
    "vector_bytes",
]


@dataclass(frozen=True)
class Activation:
    """The FFN's activation. `param` is FATReLU's threshold, else None; `source` says who named it."""

    name: str
    param: float | None = None
    source: str = "config"


def canonical_json(value: Any) -> str:
    """The one text form of a manifest or configuration: sorted keys, indent 1, ASCII, newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Manifest:
    """What a pack is. `path` is its directory. Build one to write a pack, or `Manifest.load` an existing one."""

    path: Path
    family: str
    tier: str
    gate: str
    gated: bool
    activation: Activation
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    source_dtype: str
    quant: Quant | None
    resident_quant: dict[str, Quant]
    record: Record
    prefill_chunk: int
    files: dict[str, FileEntry]
    predictor: PredictorSpec | None = None
    order: OrderSpec | None = None
    codec: str | None = None
    activity: ActivitySpec | None = None

    @staticmethod
    def load(pack_dir: str | os.PathLike[str]) -> Manifest:
        """Reads and validates pack.json and the sizes of the files it names (not their contents).

        Raises PackError for an unknown format, version, tier, codec or field, by name; DamagedPackError when the
        manifest does not match its digest or a file is missing or of another size.
        """
        manifest = read_manifest(pack_dir)
        manifest.check_sizes()
        return manifest

    @property
    def resident_path(self) -> Path:
        return self.path / RESIDENT

    @property
    def predictor_path(self) -> Path:
        return self.path / PREDICTOR

    @property
    def shape(self) -> Shape:
        """What a predictor depends on. The records tell the biases, where their matrices are not resident."""
        fields = self.record.fields
        scoring = "gate_bias" if self.gated else "up_bias"
        return Shape(
            self.layers,
            self.hidden_size,
            self.intermediate_size,
            self.gated,
            gate_bias=scoring in fields,
            up_bias="up_bias" in fields,
        )

    def flash_path(self, layer: int) -> Path:
        return self.path / flash_name(layer)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The normalized configuration: its checksum, its fields and its agreement with the manifest are checked."""
        node, _ = Node.read(self.path / CONFIG, self.files[CONFIG].sha256)
        return check_config(node, self)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest's canonical JSON: the identity of the pack."""
        return hashlib.sha256(canonical_json(self._body()).encode()).hexdigest()

    def replaced(self) -> bool:
        """Whether another pack, or none, stands at the path now."""
        try:
            return read_manifest(self.path).digest != self.digest
        except PackError:
            return True

    def check_sizes(self) -> None:
        """Raises DamagedPackError when a file of the manifest is missing or of another size."""
        for name, entry in self.files.items():
            path = self.path / name
            if not path.is_file():
                raise DamagedPackError(f"{path}: missing, expected a file of {entry.bytes} bytes")
            size = path.stat().st_size
            if size != entry.bytes:
                raise DamagedPackError(f"{path}: found {size} bytes, expected {entry.bytes}")

    def flash_header(self, layer: int) -> Header:
        """The validated header of a layer's file: `records` (U8 [intermediate_size, stride]) at byte 16384.

        With a codec `lengths` (U32 [intermediate_size]) follow.
        """
        path = self.flash_path(layer)
        header = read_header(path, PackError)
        found = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        expected = flash_tensors(self.intermediate_size, self.record.stride, self.codec)
        if found != expected or header.data_offset != ALIGN:
            raise PackError(
                f"{path}: found {shown(found)} at byte {header.data_offset}, expected {expected} at byte {ALIGN}"
            )
        return header

    def to_json(self) -> str:
        """The text of pack.json."""
        return canonical_json(self._body() | {"digest": self.digest})

    def write(self, directory: str | os.PathLike[str] | None = None) -> Path:
        """Writes pack.json into `directory` (default: `path`) and fsyncs the file. Publishing it is the caller's."""
        target = Path(directory if directory is not None else self.path) / MANIFEST
        with open(target, "wb") as file:
            file.write(self.to_json().encode())
            file.flush()
            os.fsync(file.fileno())
        return target

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "family": self.family,
            "tier": self.tier,
            "gate": self.gate,
            "gated": self.gated,
            "activation": vars(self.activation),
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "source_dtype": self.source_dtype,
            "quant": None if self.quant is None else vars(self.quant),
            "resident_quant": {name: vars(quant) for name, quant in self.resident_quant.items()},
            "record": {
                "bytes": self.record.bytes,
                "stride": self.record.stride,
                "fields": [vars(field) for field in self.record.fields.values()],
            },
            "prefill_chunk": self.prefill_chunk,
            "predictor": None if self.predictor is None else self.predictor.to_dict(),
            "files": {name: entry.to_dict() for name, entry in self.files.items()},
            **({} if self.order is None else {"order": self.order.to_dict()}),
            **({} if self.codec is None else {"codec": self.codec}),
            **({} if self.activity is None else {"activity": self.activity.to_dict()}),
        }


def read_manifest(pack_dir: str | os.PathLike[str]) -> Manifest:
    """Reads and validates pack.json alone; `Manifest.load` also checks the sizes of the files."""
    path = Path(pack_dir)
    node, text = Node.read(path / MANIFEST)
    node.equal("format", FORMAT)
    node.equal("version", VERSION)
    manifest = _manifest(node, path)
    _check_consistent(node, manifest)
    _check_files(node, manifest)
    digest = node.text("digest")
    node.finish(manifest)
    if digest != manifest.digest or text != manifest.to_json():
        raise DamagedPackError(
            f"{path / MANIFEST}: found digest {digest!r}, expected {manifest.digest!r} for its contents "
            "in canonical form; the file is damaged or was edited"
        )
    return manifest


def _manifest(node: Node, path: Path) -> Manifest:
    manifest = Manifest(
        path=path,
        family=node.choice("family", FAMILIES),
        tier=node.choice("tier", TIERS),
        gate=node.choice("gate", GATES),
        gated=node.boolean("gated"),
        activation=_activation(node.child("activation")),
        layers=node.integer("layers", 1),
        hidden_size=node.integer("hidden_size", 1),
        intermediate_size=node.integer("intermediate_size", 1),
        vocab_size=node.integer("vocab_size", 1),
        heads=node.integer("heads", 1),
        kv_heads=node.integer("kv_heads", 1),
        head_dim=node.integer("head_dim", 1),
        source_dtype=node.choice("source_dtype", SOURCE_DTYPES),
        quant=None if node.null("quant") else _quant(node.child("quant")),
        resident_quant={name: _quant(child) for name, child in node.child("resident_quant").children()},
        record=_record(node.child("record")),
        prefill_chunk=node.integer("prefill_chunk", 1),
        files={name: _file(child) for name, child in node.child("files").children()},
        order=read_order_spec(node.child("order")) if node.has("order") else None,
        codec=node.choice("codec", CODECS) if node.has("codec") else None,
    )
    if node.has("activity"):
        manifest = replace(manifest, activity=read_activity(node.child("activity"), manifest.layers))
    return manifest if node.null("predictor") else replace(manifest, predictor=_predictor(node, manifest))


def _predictor(node: Node, m: Manifest) -> PredictorSpec:
    return read_spec(node.child("predictor"), m.shape)


def _activation(node: Node) -> Activation:
    name = node.choice("name", ACTIVATIONS)
    param = node.number("param")
    if (param is None) != (name != "fatrelu"):
        node.fail("param", param, "a number for fatrelu, null for every other activation")
    if param is not None and param < 0:
        node.fail("param", param, "a number >= 0")
    return node.finish(Activation(name, param, node.choice("source", SOURCES)))


def _quant(node: Node) -> Quant:
    return node.finish(Quant(node.choice("bits", BITS), node.choice("group_size", GROUP_SIZES)))


def _record(node: Node) -> Record:
    fields = [
        child.finish(
            Field(
                child.choice("name", FIELD_NAMES),
                child.integer("offset", 0),
                child.integer("bytes", 1),
                child.choice("kind", KINDS),
            )
        )
        for child in node.items("fields")
    ]
    return node.finish(Record(node.integer("bytes", 1), node.integer("stride", 1), {f.name: f for f in fields}))


def _file(node: Node) -> FileEntry:
    size, sha256 = node.integer("bytes", 0), node.sha256("sha256")
    if not node.has("blocks"):
        return node.finish(FileEntry(size, sha256))
    blocks = node.sha256_list("blocks")
    if node.has("block_records"):
        offset, records = node.integer("data_offset", 0), node.integer("block_records", 1)
        return node.finish(FileEntry(size, sha256, blocks, data_offset=offset, block_records=records))
    return node.finish(FileEntry(size, sha256, blocks, block_bytes=node.integer("block_bytes", 1)))


def _check_consistent(node: Node, m: Manifest) -> None:
    """The fields must agree with each other: layout of the record, gate and tier, heads, groups."""
    if (m.predictor is not None) != (m.tier == "predict"):
        expected_spec = "an object" if m.tier == "predict" else "null"
        node.fail("predictor", m.predictor, f"{expected_spec} in tier {m.tier!r}")
    resident = m.tier == "exact" or (m.predictor and m.predictor.score == "gate")
    if (m.gate == "none") == bool(resident) or (m.gate == "compact" and m.tier != "exact"):
        gates = "'full' or 'compact'" if m.tier == "exact" else "'full'" if resident else "'none'"
        node.fail("gate", m.gate, f"{gates} in tier {m.tier!r}")
    if m.gate == "compact" and m.quant is not None:
        node.fail("quant", m.quant, "null where gate is 'compact'")
    if m.activity is not None and m.tier != "exact":
        node.fail("activity", m.activity.to_dict(), "no activity but in tier 'exact'")
    if m.codec is not None and (m.quant is not None or m.source_dtype == "F32"):
        node.fail("codec", m.codec, "no codec but for records of unquantized 16-bit floats")
    if m.gated != (m.family == "llama"):
        node.fail("gated", m.gated, f"{m.family == 'llama'} for family {m.family!r}")
    if m.activation.name == "silu" and m.tier == "exact":
        node.fail("activation.name", m.activation.name, "an activation with exact zeros in tier 'exact'")
    if m.activation.name == "drelu" and not m.gated:
        node.fail("activation.name", m.activation.name, "an activation without a gate for a family without one")
    if m.heads % m.kv_heads:
        node.fail("kv_heads", m.kv_heads, f"a divisor of heads ({m.heads})")
    if m.quant and m.hidden_size % m.quant.group_size:
        node.fail("quant.group_size", m.quant.group_size, f"a divisor of hidden_size ({m.hidden_size})")
    biases = "gate_bias" in m.record.fields, "up_bias" in m.record.fields
    expected = record_layout(m.gated, m.tier, m.hidden_size, m.source_dtype, m.quant, *biases, m.gate)
    if m.record != expected or list(m.record.fields) != list(expected.fields):
        node.fail("record", m.record, f"{expected}")


def _check_files(node: Node, m: Manifest) -> None:
    """Names must be plain, the files of a pack complete, and their sizes and blocks what the shapes say."""
    for name in m.files:
        if not _is_plain(name):
            node.fail("files", name, "plain file names, not a path")
    missing = [name for name in (CONFIG, RESIDENT) if name not in m.files]
    # A manifest may claim any number of layers, but at most as many files can be there.
    first = next((layer for layer in range(m.layers) if flash_name(layer) not in m.files), None)
    if first is not None:
        missing.append(flash_name(first))
    if m.predictor is not None and m.predictor.has_tensors and PREDICTOR not in m.files:
        missing.append(PREDICTOR)
    if missing:
        listing = f"{listed(sorted(m.files))}, no {', '.join(missing)}"
        node.fail("files", listing, f"{CONFIG}, {RESIDENT} and a file for each of {m.layers} layers")
    if (ORDER in m.files) != (m.order is not None):
        node.fail("files", ORDER, "that file if and only if the manifest has an order")
    names = {CONFIG, *map(flash_name, range(m.layers))}
    stride, records = m.record.stride, m.intermediate_size
    size = records * stride + (0 if m.codec is None else records * LENGTH_BYTES)
    for layer in range(m.layers):
        entry = m.files[flash_name(layer)]
        blocks = -(-size // (block_records(stride) * stride))
        found = (entry.bytes, entry.data_offset, entry.block_records, len(entry.blocks))
        expected = (ALIGN + size, ALIGN, block_records(stride), blocks)
        if found != expected:
            node.fail(f"files.{flash_name(layer)}", found, f"bytes, data_offset, block_records, blocks {expected}")
    if PREDICTOR in m.files and not (m.predictor is not None and m.predictor.has_tensors):
        node.fail("files", PREDICTOR, "no such file for a pack whose predictor has no tensors")
    for name in {RESIDENT, PREDICTOR} & set(m.files):
        entry = m.files[name]
        if (entry.block_bytes, len(entry.blocks)) != (BLOCK_BYTES, -(-entry.bytes // BLOCK_BYTES)):
            node.fail(f"files.{name}", len(entry.blocks), f"a checksum for every {BLOCK_BYTES} bytes")
        names.add(name)
    for name in set(m.files) - names:
        if m.files[name].blocks or m.files[name].block_bytes:
            node.fail(f"files.{name}", "blocks", "only bytes and sha256")


def _is_plain(name: str) -> bool:
    """Whether this is a name that a file can have on every system, with no path in it."""
    special = any(c in "/\\:" or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name)
    return not special and name not in ("", ".", "..", MANIFEST) and len(name.encode()) <= MAX_NAME_BYTES
