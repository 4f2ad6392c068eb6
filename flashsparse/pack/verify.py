"""Checks every byte of a pack against its checksums and says which records or tensors are damaged.

Files that the manifest does not name are ignored. Nothing is repaired. A pack that is replaced while it is verified
is verified anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashsparse.errors import PackError
from flashsparse.pack.checks import listed
from flashsparse.pack.codec import flash_tensors, whole_records
from flashsparse.pack.layout import FileDigest, FileEntry, flash_name
from flashsparse.pack.manifest import PREDICTOR, RESIDENT, Manifest, read_manifest
from flashsparse.pack.order import ORDER, read_orders
from flashsparse.pack.safetensors import header_bytes, read_header

CHUNK_BYTES = 4 << 20
ATTEMPTS = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Damage:
    """One thing wrong with one file. `first` and `last` are record numbers of a flash file, else byte offsets."""

    file: str
    kind: str  # "missing", "size", "unreadable", "contents", "header", "records", "lengths", "bytes"
    detail: str
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


def verify(pack_dir: str | os.PathLike[str], progress: Progress | None = None) -> list[Damage]:
    """Reads the whole pack; the list of damages, empty for a sound pack.

    `progress(done, total)` is called with bytes. Raises PackError (DamagedPackError) when pack.json itself cannot be
    trusted, since nothing else can be checked then, or when the pack is replaced again and again.
    """
    for _ in range(ATTEMPTS):
        manifest = read_manifest(pack_dir)
        damages = _verify(manifest, progress)
        if not manifest.replaced():
            return damages
    raise PackError(f"{pack_dir}: the pack was replaced {ATTEMPTS} times while it was verified; try again")


def _verify(manifest: Manifest, progress: Progress | None) -> list[Damage]:
    total = sum(entry.bytes for entry in manifest.files.values())
    layers = {flash_name(layer): layer for layer in range(manifest.layers)}
    damages: list[Damage] = []
    done = 0

    def tick(count: int) -> None:
        if progress:
            progress(done + count, total)

    for name, entry in sorted(manifest.files.items()):
        damages += _verify_file(manifest, name, entry, layers.get(name), tick)
        done += entry.bytes
        tick(0)
    return damages


def _verify_file(
    manifest: Manifest, name: str, entry: FileEntry, layer: int | None, tick: Callable[[int], None]
) -> list[Damage]:
    path = manifest.path / name
    if not os.path.isfile(path):
        return [Damage(name, "missing", f"missing, expected a file of {entry.bytes} bytes")]
    damages: list[Damage] = []
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            damages.append(Damage(name, "size", f"found {size} bytes, expected {entry.bytes}"))
        found = _digest(path, manifest, entry, tick)
        return damages + _compare(manifest, name, entry, found, layer, bool(damages))
    except OSError as problem:
        return [*damages, Damage(name, "unreadable", f"cannot be read: {problem.strerror}")]


def _compare(
    manifest: Manifest, name: str, entry: FileEntry, found: FileEntry, layer: int | None, resized: bool
) -> list[Damage]:
    """What differs between a file's entry and what was found; a changed size alone says enough of a small file."""
    if found.sha256 == entry.sha256:
        if layer is not None and manifest.codec is not None:
            return _stored(manifest, name, layer)
        return _order(manifest) if name == ORDER else []
    if layer is not None:
        return list(_flash(manifest, name, entry, found, layer))
    if name in (RESIDENT, PREDICTOR):
        return list(_tensors(manifest.path / name, name, entry, found))
    return [] if resized else [Damage(name, "contents", "does not match its checksum")]


def _stored(manifest: Manifest, name: str, layer: int) -> list[Damage]:
    """Compressed records whose bytes are what was written must also become records."""
    try:
        for _ in whole_records(manifest, layer):
            pass
    except PackError as problem:
        return [Damage(name, "contents", str(problem))]
    return []


def _order(manifest: Manifest) -> list[Damage]:
    """An order whose bytes are what was written must also be one."""
    try:
        read_orders(manifest)
    except PackError as problem:
        return [Damage(ORDER, "contents", str(problem))]
    return []


def _digest(path: Path, manifest: Manifest, entry: FileEntry, tick: Callable[[int], None]) -> FileEntry:
    """The entry of the file as it is now, in the blocks of `entry`; bytes past the expected size are left out."""
    block = entry.block_records * manifest.record.stride or entry.block_bytes
    digest = FileDigest(entry.data_offset, block, entry.block_records)
    buffer = bytearray(CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while digest.bytes < entry.bytes:
            room = min(len(buffer), entry.bytes - digest.bytes)
            got = file.readinto(memoryview(buffer)[:room])
            if not got:
                break
            digest.update(memoryview(buffer)[:got])
            tick(digest.bytes)
    return digest.entry()


def _bad_ranges(expected: FileEntry, found: FileEntry) -> Iterator[tuple[int, int]]:
    """Ranges [first, end) of neighbouring blocks that differ or are missing."""
    start = None
    for index, checksum in enumerate(expected.blocks):
        bad = index >= len(found.blocks) or found.blocks[index] != checksum
        if bad and start is None:
            start = index
        if not bad and start is not None:
            yield start, index
            start = None
    if start is not None:
        yield start, len(expected.blocks)


def _flash(manifest: Manifest, name: str, entry: FileEntry, found: FileEntry, layer: int) -> Iterator[Damage]:
    ranges = list(_bad_ranges(entry, found))
    header = header_bytes(flash_tensors(manifest.intermediate_size, manifest.record.stride, manifest.codec))
    with open(manifest.path / name, "rb") as file:
        damaged_header = file.read(len(header)) != header
    if damaged_header or (not ranges and found.bytes == entry.bytes):
        detail = f"layer {layer}: the header (bytes 0..{entry.data_offset - 1}) is damaged"
        yield Damage(name, "header", detail, 0, entry.data_offset - 1)
    for start, end in ranges:
        first = start * entry.block_records
        last = min(end * entry.block_records, manifest.intermediate_size) - 1
        if first > last:  # a codec's lengths, in a block of their own
            yield Damage(name, "lengths", f"layer {layer}: the lengths of its records are damaged")
            continue
        yield Damage(name, "records", f"layer {layer}: records {first}..{last} are damaged", first, last)


def _tensors(path: Path, name: str, entry: FileEntry, found: FileEntry) -> Iterator[Damage]:
    for start, end in _bad_ranges(entry, found):
        first, last = start * entry.block_bytes, min(end * entry.block_bytes, entry.bytes) - 1
        detail = f"bytes {first}..{last} are damaged{_tensors_in(path, first, last)}"
        yield Damage(name, "bytes", detail, first, last)


def _tensors_in(path: Path, first: int, last: int) -> str:
    """Which tensors lie in a byte range, when the header can still be read."""
    try:
        header = read_header(path, PackError)
    except PackError:
        return ""
    names = [info.name for info in header.tensors.values() if info.begin <= last and info.end > first]
    return f" ({listed(names)})" if names else ""
