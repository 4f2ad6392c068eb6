"""The manifest: golden bytes, the layout of records, and refusal of everything the format does not state."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashsparse.errors import DamagedPackError, PackError
from flashsparse.models.tensors import check_resident
from flashsparse.pack.gate_copy import copy_tensors
from flashsparse.pack.layout import Field, FileDigest, Quant, block_records, record_layout, resident_digest
from flashsparse.pack.manifest import Manifest, canonical_json, read_manifest
from flashsparse.pack.safetensors import read_header
from flashsparse.pack.verify import verify
from tests.unit.tiny_pack import llama_tensors, write_pack

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def pack(tmp_path: Path) -> Manifest:
    return write_pack(tmp_path / "pack")


def edit(pack: Manifest, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes pack.json and gives it a matching digest, so that only the change itself can be refused."""
    path = pack.path / "pack.json"
    body = json.loads(path.read_text())
    del body["digest"]
    change(body)
    body["digest"] = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    path.write_text(canonical_json(body))


def put(body: dict[str, Any], where: str, value: Any) -> None:
    *parents, last = where.split("/")
    target: Any = body
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else target[name]
    target[last] = value


def refused(pack: Manifest, *parts: str) -> None:
    with pytest.raises(PackError) as caught:
        Manifest.load(pack.path)
    for part in (str(pack.path), *parts):
        assert part in str(caught.value)


def test_golden_pack(pack: Manifest) -> None:
    """The bytes of a tiny pack, built here by hand; a change of any of them is a new format version."""
    assert (pack.path / "pack.json").read_text() == (GOLDEN / "pack.json").read_text()
    assert (pack.path / "config.json").read_text() == (GOLDEN / "config.json").read_text()
    text = b'{"records":{"dtype":"U8","shape":[6,64],"data_offsets":[0,384]}}'
    for layer in range(2):
        data = (pack.path / f"flash-00{layer}.safetensors").read_bytes()
        assert data[:16384] == struct.pack("<Q", 16376) + text + b" " * (16376 - len(text))
        assert data[16384:] == bytes((100 + layer + 7 * i + i // 251) % 256 for i in range(384))
    resident = (pack.path / "resident.safetensors").read_bytes()
    assert resident[:8] == struct.pack("<Q", 16376)
    start = b'{"lm_head.weight":{"dtype":"F16","shape":[10,8],"data_offsets":[0,160]},"model.embed_tokens.weight":'
    assert resident[8:].startswith(start)


def test_golden_compact_pack(tmp_path: Path) -> None:
    """With a compact gate: whole records, and the copy's tensors in the order of the resident file."""
    pack = write_pack(tmp_path / "pack", compact=True)
    assert (pack.path / "pack.json").read_text() == (GOLDEN / "compact.json").read_text()
    assert verify(pack.path) == []
    assert Manifest.load(pack.path) == pack
    found = pack.flash_header(0).tensors["records"].shape, pack.record.bytes
    assert found == ((6, 64), 48)
    header = read_header(pack.resident_path, PackError)
    check_resident(pack, header)
    gate = "model.layers.0.mlp.gate_proj."
    copy = {n.removeprefix(gate): (t.dtype, t.shape) for n, t in header.tensors.items() if n.startswith(gate)}
    assert list(copy.items()) == [
        ("errors", ("F32", (6, 3))),
        ("scales", ("BF16", (6, 1))),
        ("high", ("I8", (6, 64))),
        ("low", ("U8", (6, 32))),
    ]


def test_compact_gates_are_of_unquantized_packs_of_tier_exact(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack", compact=True)
    edit(pack, lambda body: put(body, "tier", "dense"))
    refused(pack, "gate: found 'compact', expected 'none' in tier 'dense'")
    pack = write_pack(tmp_path / "quantized", compact=True, quant=Quant(4, 64), hidden_size=64)
    refused(pack, "quant: found", "null where gate is 'compact'")


@pytest.mark.parametrize("part", ["high", "low", "scales", "errors"])
def test_a_compact_gate_has_all_of_its_parts(tmp_path: Path, part: str) -> None:
    tensors = llama_tensors(8, 6, 2, 10, 8, gate=False)
    for layer in range(2):
        tensors |= copy_tensors(f"model.layers.{layer}.mlp.gate_proj", 6, 8)
    name = f"model.layers.1.mlp.gate_proj.{part}"
    missing = {key: value for key, value in tensors.items() if key != name}
    other = {**tensors, name: (tensors[name][0], (7, *tensors[name][1][1:]))}
    for index, (held, words) in enumerate(((missing, "missing, expected"), (other, "found"))):
        pack = write_pack(tmp_path / f"pack{index}", held, compact=True)
        with pytest.raises(PackError, match=f"{name}': {words}"):
            check_resident(pack, read_header(pack.resident_path, PackError))


def test_golden_manifest_is_read() -> None:
    manifest = read_manifest(GOLDEN)
    assert manifest.digest == json.loads((GOLDEN / "pack.json").read_text())["digest"]
    assert (manifest.layers, manifest.hidden_size, manifest.intermediate_size) == (2, 8, 6)
    assert manifest.record.fields["down"] == Field("down", 16, 16, "vector")
    assert manifest.activation.name == "relu"


def test_round_trip(pack: Manifest) -> None:
    loaded = Manifest.load(pack.path)
    assert loaded == pack
    assert loaded.to_json() == (pack.path / "pack.json").read_text()
    assert loaded.config["hidden_size"] == 8
    assert loaded.flash_path(1).name == "flash-001.safetensors"
    assert loaded.flash_header(1).tensors["records"].shape == (6, 64)
    assert verify(pack.path) == []


def layout(record: Any) -> list[tuple[str, int, int, str]]:
    return [(f.name, f.offset, f.bytes, f.kind) for f in record.fields.values()]


def test_layout_gated_exact_keeps_the_gate_out() -> None:
    record = record_layout(True, "exact", 10, "BF16", None, has_gate_bias=True, has_up_bias=True)
    assert layout(record) == [("up", 0, 20, "vector"), ("up_bias", 20, 2, "scalar"), ("down", 24, 20, "vector")]
    assert (record.bytes, record.stride) == (44, 64)


def test_layout_gated_dense() -> None:
    record = record_layout(True, "dense", 5, "F16", None, has_gate_bias=True, has_up_bias=True)
    assert layout(record) == [
        ("gate", 0, 10, "vector"),
        ("gate_bias", 12, 2, "scalar"),
        ("up", 16, 10, "vector"),
        ("up_bias", 28, 2, "scalar"),
        ("down", 32, 10, "vector"),
    ]
    assert (record.bytes, record.stride) == (44, 64)


def test_layout_not_gated() -> None:
    assert layout(record_layout(False, "exact", 16, "F32", None, has_up_bias=True)) == [("down", 0, 64, "vector")]
    record = record_layout(False, "dense", 16, "F32", None, has_up_bias=True)
    assert layout(record) == [("up", 0, 64, "vector"), ("up_bias", 64, 4, "scalar"), ("down", 68, 64, "vector")]
    assert record.stride == 192


@pytest.mark.parametrize(("bits", "source", "size"), [(4, "F16", 36), (8, "BF16", 68), (4, "F32", 40)])
def test_layout_quantized(bits: int, source: str, size: int) -> None:
    record = record_layout(True, "exact", 64, source, Quant(bits, 64))
    assert [f.bytes for f in record.fields.values()] == [size, size]


def test_7b_record_matches_arithmetic() -> None:
    record = record_layout(True, "exact", 4096, "F16", None)
    assert (record.bytes, record.stride) == (16384, 16384)
    assert block_records(record.stride) == 256
    assert block_records(8 << 20) == 1


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("format", "gguf", "format: found 'gguf'"),
        ("version", 2, "version: found 2, expected 1"),
        ("version", True, "version: found True"),
        ("version", "1", "version: found '1'"),
        ("family", "mamba", "family: found 'mamba', expected one of llama, opt"),
        ("tier", "sparse", "tier: found 'sparse', expected one of exact, predict, dense"),
        ("gate", "small", "gate: found 'small', expected one of full, compact, none"),
        ("gate", "compact", "record: found"),
        ("gate", "none", "'full' or 'compact' in tier 'exact'"),
        ("gated", False, "gated: found False"),
        ("gated", 1, "gated: found 1"),
        ("activation/name", "gelu", "activation.name: found 'gelu'"),
        ("activation/name", "fatrelu", "activation.param: found None"),
        ("activation/param", 0.5, "activation.param: found 0.5"),
        ("activation/name", "silu", "activation.name: found 'silu', expected an activation with exact zeros"),
        ("activation", {"name": "fatrelu", "param": -0.5, "source": "config"}, "activation.param: found -0.5"),
        ("activation/source", "guess", "activation.source"),
        ("activation/extra", 1, "unknown field activation.extra"),
        ("codec", "lz4", "codec: found 'lz4', expected one of zstd"),
        ("activity", {"texts": [], "tokens": 5, "densities": [0.5, 0.5]}, "activity.texts: found []"),
        ("activity", {"texts": ["a" * 64], "tokens": 0, "densities": [0.5, 0.5]}, "activity.tokens: found 0"),
        ("activity", {"texts": ["a" * 64], "tokens": 5, "densities": [0.5]}, "each of 2 layers"),
        ("activity", {"texts": ["a" * 64], "tokens": 5, "densities": [0.5, 1.5]}, "activity.densities: found"),
        ("activity", {"texts": ["a" * 64], "tokens": 5, "densities": [1, 0.5]}, "activity.densities: found"),
        ("record/order", [], "unknown field record.order"),
        ("files/config.json/mode", 420, "unknown field files.config.json.mode"),
        ("layers", 0, "layers: found 0, expected an integer >= 1"),
        ("layers", 3, "no flash-002.safetensors"),
        ("layers", 10**12, "no flash-002.safetensors', expected"),
        ("layers", 2.0, "layers: found 2.0"),
        ("hidden_size", 2**70, "hidden_size"),
        ("hidden_size", -8, "hidden_size: found -8"),
        ("kv_heads", 3, "kv_heads: found 3, expected a divisor of heads (2)"),
        ("source_dtype", "F64", "source_dtype: found 'F64'"),
        ("quant", {"bits": 3, "group_size": 64}, "quant.bits: found 3, expected one of 4, 8"),
        ("quant", {"bits": 4, "group_size": 64}, "a divisor of hidden_size (8)"),
        ("quant", {"bits": 4, "group_size": 64, "mode": "mxfp4"}, "unknown field quant.mode"),
        ("quant", 4, "quant: found 4"),
        ("resident_quant", {"lm_head": {"bits": 8}}, "resident_quant.lm_head.group_size: missing"),
        ("record/stride", 128, "record: found"),
        ("record/bytes", 33, "record: found"),
        ("record/fields/0/name", "gate", "record: found"),
        ("record/fields/0/name", "router", "record.fields[0].name: found 'router'"),
        ("record/fields/1/offset", 20, "record: found"),
        ("record/fields/1/kind", "matrix", "record.fields[1].kind"),
        ("record/fields", {}, "record.fields: found {}"),
        ("prefill_chunk", 0, "prefill_chunk"),
        ("files/..", {"bytes": 1, "sha256": "0" * 64}, "plain file names"),
        ("files/a\\b", {"bytes": 1, "sha256": "0" * 64}, "plain file names"),
        ("files/pack.json", {"bytes": 1, "sha256": "0" * 64}, "plain file names"),
        ("files/config.json/sha256", "0" * 63, "files.config.json.sha256"),
        ("files/config.json/sha256", "G" * 64, "files.config.json.sha256"),
        ("files/config.json/bytes", -1, "files.config.json.bytes"),
        ("files/flash-000.safetensors/bytes", 9, "files.flash-000.safetensors"),
        ("files/flash-000.safetensors/data_offset", 8, "files.flash-000.safetensors"),
        ("files/flash-000.safetensors/block_records", 1, "files.flash-000.safetensors"),
        ("files/flash-000.safetensors/blocks", [], "files.flash-000.safetensors"),
        ("files/flash-000.safetensors/blocks", [1], "files.flash-000.safetensors.blocks"),
        ("files/resident.safetensors/block_bytes", 4096, "files.resident.safetensors"),
        ("files/resident.safetensors/blocks", [], "files.resident.safetensors"),
        ("files", [], "files: found []"),
    ],
)
def test_refuses(pack: Manifest, where: str, value: Any, message: str) -> None:
    edit(pack, lambda body: put(body, where, value))
    refused(pack, message)


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "sub/file", "c:file", "", "a\x00b", "\ud800", "x" * 256]
)
def test_refuses_paths(pack: Manifest, name: str) -> None:
    edit(pack, lambda body: body["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    refused(pack, "plain file names")


@pytest.mark.parametrize("field", ["format", "activation", "record", "files", "quant", "prefill_chunk", "predictor"])
def test_refuses_missing_fields(pack: Manifest, field: str) -> None:
    edit(pack, lambda body: body.pop(field))
    refused(pack, f"{field}: missing")


@pytest.mark.parametrize("name", ["config.json", "resident.safetensors", "flash-001.safetensors"])
def test_refuses_manifests_without_a_file(pack: Manifest, name: str) -> None:
    edit(pack, lambda body: body["files"].pop(name))
    refused(pack, f"no {name}")


def test_refuses_repeated_record_fields(pack: Manifest) -> None:
    edit(pack, lambda body: body["record"]["fields"].append(body["record"]["fields"][0]))
    refused(pack, "record")


def test_every_changed_byte_of_the_manifest_is_found(pack: Manifest) -> None:
    path = pack.path / "pack.json"
    data = path.read_bytes()
    for position in range(0, len(data), 5):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(PackError):
            read_manifest(pack.path)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b'{"format": 1, "format": 2}', b"[" * 60000])
def test_refuses_what_is_no_document(pack: Manifest, text: bytes) -> None:
    (pack.path / "pack.json").write_bytes(text)
    refused(pack, "pack.json")


def test_refuses_another_digest_and_other_whitespace(pack: Manifest) -> None:
    path = pack.path / "pack.json"
    text = path.read_text()
    path.write_text(text.replace(pack.digest, "0" * 64))
    refused(pack, "digest", pack.digest)
    path.write_text(json.dumps(json.loads(text)))
    refused(pack, "canonical form")


@pytest.mark.parametrize("path", ["layers", "files/config.json", "files"])
def test_messages_stay_short(pack: Manifest, path: str) -> None:
    edit(pack, lambda body: put(body, path, {f"name-{i}": [i] * 500 for i in range(500)}))
    with pytest.raises(PackError) as caught:
        Manifest.load(pack.path)
    assert len(str(caught.value)) < 600


def test_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"pack\.json: missing; .* is not a pack"):
        Manifest.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PackError, match=f"is not a pack; .*flashsparse convert {tmp_path} DST"):
        Manifest.load(tmp_path)


def test_sizes_are_checked_on_load(pack: Manifest) -> None:
    flash = pack.flash_path(1)
    flash.write_bytes(flash.read_bytes()[:-1])
    with pytest.raises(DamagedPackError, match=r"flash-001\.safetensors: found 16767 bytes, expected 16768"):
        Manifest.load(pack.path)
    flash.unlink()
    with pytest.raises(DamagedPackError, match=r"flash-001\.safetensors: missing"):
        Manifest.load(pack.path)


def test_config_is_checked_when_read(pack: Manifest) -> None:
    path = pack.path / "config.json"
    path.write_bytes(path.read_bytes().replace(b"relu", b"silu"))
    with pytest.raises(DamagedPackError, match="checksum"):
        _ = Manifest.load(pack.path).config


def test_config_must_agree_with_the_manifest(pack: Manifest) -> None:
    entry = pack.files["config.json"]
    data = (pack.path / "config.json").read_bytes().replace(b'"vocab_size": 10', b'"vocab_size": 11')
    (pack.path / "config.json").write_bytes(data)
    files = pack.files | {"config.json": replace(entry, sha256=hashlib.sha256(data).hexdigest())}
    replace(pack, files=files).write()
    with pytest.raises(PackError, match="vocab_size: found 11, expected 10"):
        _ = Manifest.load(pack.path).config


def test_a_pack_replaced_while_it_is_verified_is_verified_anew(pack: Manifest, tmp_path: Path) -> None:
    other = write_pack(tmp_path / "other", intermediate_size=7)
    done: list[int] = []

    def replace_once(count: int, total: int) -> None:
        if not done:
            pack.path.rename(tmp_path / "old")
            other.path.rename(pack.path)
        done.append(count)

    assert verify(pack.path, replace_once) == []
    assert len(done) > 2


def test_a_pack_replaced_again_and_again_cannot_be_verified(pack: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "replaced", lambda self: True)
    with pytest.raises(PackError, match="was replaced 5 times"):
        verify(pack.path)


def test_flash_header_is_checked(pack: Manifest) -> None:
    path = pack.flash_path(0)
    path.write_bytes(path.read_bytes().replace(b"[6,64]", b"[64,6]"))
    with pytest.raises(PackError, match=r"flash-000\.safetensors"):
        pack.flash_header(0)


@given(
    st.binary(max_size=500),
    st.integers(0, 40),
    st.integers(0, 60),
    st.lists(st.integers(1, 90), min_size=1, max_size=9),
)
def test_file_digest_equals_hashing_slices(data: bytes, start: int, block: int, steps: list[int]) -> None:
    digest = FileDigest(start, block, 1)
    position, turn = 0, 0
    while position < len(data):
        step = steps[turn % len(steps)]
        digest.update(data[position : position + step])
        position, turn = position + step, turn + 1
    entry = digest.entry()
    slices = [data[i : i + block] for i in range(start, len(data), block)] if block else []
    assert entry.bytes == len(data)
    assert entry.sha256 == hashlib.sha256(data).hexdigest()
    assert list(entry.blocks) == [hashlib.sha256(part).hexdigest() for part in slices]


def test_resident_digest_uses_4_mib_blocks() -> None:
    digest = resident_digest()
    digest.update(bytes((4 << 20) + 1))
    assert len(digest.entry().blocks) == 2
