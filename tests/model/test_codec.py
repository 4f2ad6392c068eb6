"""Compressed records: the same bits as without, in every way that records arrive; damage is named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from zstandard import frame_header_size

import flashsparse
from converter.convert import convert
from flashsparse.codec_outlook import sample_codec
from flashsparse.errors import FlashReadError, PackError, UsageError
from flashsparse.flash.plan import SEPARATE
from flashsparse.pack.codec import Damaged, Decoder, compression, encode, read_lengths, whole_records
from flashsparse.pack.layout import flash_digest
from flashsparse.pack.manifest import Manifest
from flashsparse.pack.verify import verify
from tests.checkpoints import write_checkpoint
from tests.model.packs import SHAPE

PROMPT = list(range(3, 30))


@pytest.fixture(scope="module", params=["F16", "BF16", "predict"])
def packs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One checkpoint as a pack without the codec, and with it: tier exact of either type, or predict."""
    root = tmp_path_factory.mktemp(request.param)
    source = root / "source"
    source.mkdir()
    predict = request.param == "predict"
    tier = "predict" if predict else "exact"
    write_checkpoint(source, **{**SHAPE, "dtype": "BF16" if predict else request.param})
    return convert(source, root / "plain", tier=tier), convert(source, root / "zstd", tier=tier, codec="zstd")


def logits(pack: Path, **options: object) -> np.ndarray:
    """Of a prompt, and of tokens decoded one at a time after it."""
    with flashsparse.load(pack, max_kv_size=64, **options) as engine, engine.session() as session:  # type: ignore[arg-type]
        steps = [session.logits(PROMPT), *(session.logits([token]) for token in (5, 9, 40, 5, 11, 2))]
        return np.concatenate(steps)


def test_records_are_the_same(packs: tuple[Path, Path]) -> None:
    plain, packed = map(Manifest.load, packs)
    assert verify(packed.path) == []
    assert packed.codec == "zstd" and packed.record == plain.record
    assert 1.0 <= compression(packed) < 2.0
    for layer in range(plain.layers):
        both = zip(whole_records(plain, layer), whole_records(packed, layer), strict=True)
        assert all(at == first and np.array_equal(found, expected) for (at, expected), (first, found) in both)


@pytest.mark.parametrize(
    "options",
    [{"slots": 512}, {"slots": 7}, {"slots": 40, "lookahead": "on"}, {"slots": 40, "read_mode": "buffered"},
     {"slots": 64, "threads": 2, "io_threads": 1, "layers": "modules"}],
)  # fmt: skip
def test_results_are_the_same_bits(packs: tuple[Path, Path], options: dict[str, object]) -> None:
    plain, packed = packs
    assert np.array_equal(logits(packed, **options), logits(plain, **options))


def test_less_is_read(packs: tuple[Path, Path]) -> None:
    manifest = Manifest.load(packs[1])
    engine = flashsparse.load(packs[1], slots=20, io_threads=1, read_mode="buffered")
    with engine, engine.session() as session:
        for ffn in engine._ffns:
            ffn.flash.merging = SEPARATE
        session.logits(PROMPT[:1])
        read = engine.counters.flash_bytes / engine.counters.misses
        assert read == pytest.approx(manifest.record.bytes / compression(manifest), rel=0.02)
        assert engine.peak_memory() - engine.runtime_bytes <= engine.plan.budget


def damaged(pack: Path, target: Path, offset: int) -> Path:
    """A copy whose first layer's file has four bytes changed."""
    target.mkdir()
    for path in pack.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    with open(target / "flash-000.safetensors", "r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(b"\xff" * 4)
    return target


def test_damage_is_named(packs: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = Manifest.load(packs[1])
    half = manifest.record.bytes // 2
    record = int(np.argmin(read_lengths(manifest.flash_header(0), manifest.record.bytes)))  # one that is compressed
    copy = damaged(packs[1], tmp_path / "frame", 16384 + record * manifest.record.stride + half)
    assert [d.kind for d in verify(copy)] == ["records"]
    with pytest.raises(PackError, match=f"record {record}: cannot be decompressed"):
        list(whole_records(Manifest.load(copy), 0))
    with pytest.raises(FlashReadError, match=f"record {record} cannot be decompressed"):
        logits(copy, slots=512)
    copy = damaged(packs[1], tmp_path / "lengths", -4)
    assert [d.kind for d in verify(copy)] in (["lengths"], ["records"])
    with pytest.raises(PackError, match=f"record {manifest.intermediate_size - 1}: found a length of 4294967295"):
        logits(copy, slots=512)


def test_a_length_that_hides_compression_is_named(packs: tuple[Path, Path], tmp_path: Path) -> None:
    """As long as a record that is not compressed, in a file whose checksums were made afterwards."""
    manifest = Manifest.load(packs[1])
    size, path = manifest.record.bytes, tmp_path / "pack" / "flash-000.safetensors"
    record = int(np.argmin(read_lengths(manifest.flash_header(0), size)))
    shutil.copytree(packs[1], tmp_path / "pack")
    data = bytearray(path.read_bytes())
    at = len(data) - 4 * (manifest.intermediate_size - record)
    data[at : at + 4] = size.to_bytes(4, "little")
    path.write_bytes(data)
    digest = flash_digest(manifest.record.stride)
    digest.update(data)
    files = manifest.files | {path.name: digest.entry()}
    (tmp_path / "pack" / "pack.json").write_text(replace(manifest, path=tmp_path / "pack", files=files).to_json())
    damage = verify(tmp_path / "pack")
    assert [d.kind for d in damage] == ["contents"]
    assert f"record {record}: cannot be decompressed: found a length of {size} bytes" in str(damage[0])
    with pytest.raises(FlashReadError, match=f"record {record} cannot be decompressed: found a length"):
        logits(tmp_path / "pack", slots=512)


def test_a_record_that_begins_like_a_frame_is_read(packs: tuple[Path, Path]) -> None:
    records = np.random.default_rng(0).integers(0, 256, (3, 512), np.uint8)  # nothing to compress
    records[1, 256:260] = [0x28, 0xB5, 0x2F, 0xFD]
    stored, lengths = encode(records, 512)
    assert lengths.tolist() == [512] * 3
    at = np.arange(3) * 512
    Decoder(512).decode(stored.reshape(-1), at, lengths.astype(np.int64), at)
    assert np.array_equal(stored, records)


def test_frames_that_lie_are_named() -> None:
    """A frame whose header promises more than there is memory, or less than a record has."""
    rng = np.random.default_rng(0)
    records = (rng.standard_normal((20, 256)) / 50).astype(np.float16).view(np.uint8)
    stored, lengths = encode(records, 512)
    frame = stored[7, 256 : lengths[7]].tobytes()
    places = np.arange(20) * 512
    for size in (0, 255, 1 << 20, 1 << 50, 1 << 63):
        lying = b"\x28\xb5\x2f\xfd\xe0" + size.to_bytes(8, "little") + frame[frame_header_size(frame) :]
        memory = stored.copy()
        memory[7, 256 : 256 + len(lying)] = np.frombuffer(lying, np.uint8)
        lengths[7] = 256 + len(lying)
        for parallel in (True, False):
            decoder = Decoder(512, 2)
            decoder._parallel = parallel
            with pytest.raises(Damaged) as found:
                decoder.decode(memory.reshape(-1), places, lengths.astype(np.int64), places)
            assert found.value.position == 7


def test_a_sample_of_either_pack_is_the_same(packs: tuple[Path, Path]) -> None:
    plain, packed = (sample_codec(Manifest.load(pack), 2) for pack in packs)
    assert plain is not None and packed is not None
    assert plain.ratio == packed.ratio and plain.pays_below < plain.decode_rate


def test_what_has_no_codec_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_checkpoint(source, **{**SHAPE, "dtype": "F32"})
    for options, found in (({}, "F32"), ({"bits": 8}, "--bits 8")):
        with pytest.raises(UsageError, match=f"--codec zstd is for records of 16-bit floats, but found {found}"):
            convert(source, tmp_path / "pack", codec="zstd", **options)  # type: ignore[arg-type]
