"""Safetensors headers, read strictly and written deterministically. Knows names, dtypes, shapes and offsets only.

Shapes and offsets are chosen by whoever made the file, so everything is checked against the file's real size before
anything is allocated. Tensor data is read by range; bfloat16 is handled as uint16, as NumPy has no such type.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from flashsparse.errors import CheckpointError, FlashSparseError, PackError

MAX_HEADER_BYTES = 100_000_000  # the format's own cap
MAX_TENSOR_BYTES = 2**63 - 1
ALIGN = 16384  # where data starts in the files of a pack: a page on every platform

_NUMPY: dict[str, str] = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
ITEM_BYTES: dict[str, int] = {name: np.dtype(code).itemsize for name, code in _NUMPY.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. `begin` and `end` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A validated header: the tensors by name, in file order, and where their data starts."""

    path: Path
    data_offset: int
    file_bytes: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy type that holds a safetensors dtype; BF16 and 8-bit floats as unsigned integers of their size."""
    return np.dtype(_NUMPY[dtype])


def shape_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor: the product of its shape times the size of its dtype."""
    total = ITEM_BYTES[dtype]
    for size in shape:
        total *= size
    return total


class _Reader:
    """Validates one file; every message names the file, and the tensor where there is one."""

    def __init__(self, path: Path, error: type[FlashSparseError]) -> None:
        self.path, self.error = path, error

    def fail(self, found: str, expected: str, tensor: str | None = None) -> NoReturn:
        where = f"{self.path}: " + ("" if tensor is None else f"tensor {tensor!r}: ")
        raise self.error(f"{where}found {found}, expected {expected}")

    def load(self) -> tuple[bytes, int]:
        """The header's bytes and the file's size."""
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    self.fail(f"a file of {size} bytes", "at least the 8 bytes of the header's length")
                (length,) = struct.unpack("<Q", file.read(8))
                if length > MAX_HEADER_BYTES:
                    self.fail(f"a header of {length} bytes", f"at most {MAX_HEADER_BYTES}")
                if length > size - 8:
                    self.fail(f"a header of {length} bytes in a file of {size}", f"at most {size - 8} (cut short?)")
                return file.read(length), size
        except OSError as problem:
            raise self.error(f"{self.path}: cannot be read: {problem.strerror}") from problem

    def parse(self, raw: bytes) -> dict[str, Any]:
        if not raw.startswith(b"{"):
            self.fail(f"a header that starts with {raw[:1]!r}", "'{'")
        try:
            parsed = json.loads(raw.decode(), object_pairs_hook=self.unique, parse_constant=self.constant)
        except (ValueError, RecursionError) as problem:
            self.fail(f"a header that is not JSON ({problem})", "one JSON object")
        return dict(parsed)

    def unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                self.fail(f"the key {key!r} twice in the header", "each key once")
            result[key] = value
        return result

    def constant(self, text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    def metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            self.fail(f"__metadata__ of type {type(value).__name__}", "an object of strings")
        for key, text in value.items():
            if not isinstance(text, str):
                self.fail(f"__metadata__ {key!r} of type {type(text).__name__}", "a string")
        return value

    def tensor(self, name: str, entry: Any, data_offset: int, file_bytes: int) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            found = f"fields {sorted(entry)}" if isinstance(entry, dict) else type(entry).__name__
            self.fail(found, "the fields dtype, shape, data_offsets", name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            self.fail(f"dtype {dtype!r}", f"one of {', '.join(ITEM_BYTES)}", name)
        if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
            self.fail(f"shape {shape!r}", "a list of integers >= 0", name)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
            self.fail(f"data_offsets {offsets!r}", "two integers >= 0", name)
        begin, end = offsets
        if begin > end or end > file_bytes - data_offset:
            self.fail(f"data_offsets {offsets}", f"begin <= end <= {file_bytes - data_offset} (the file's data)", name)
        nbytes = shape_bytes(dtype, shape)
        if nbytes > MAX_TENSOR_BYTES:
            self.fail(f"shape {shape} of {dtype}", f"at most {MAX_TENSOR_BYTES} bytes", name)
        if nbytes != end - begin:
            self.fail(f"{end - begin} bytes of data", f"{nbytes} for shape {shape} of {dtype}", name)
        return TensorInfo(name, dtype, tuple(shape), data_offset + begin, data_offset + end)

    def check_cover(self, tensors: list[TensorInfo], data_offset: int, file_bytes: int) -> None:
        """The tensors, sorted by offset, must tile the data with no hole, overlap or rest."""
        position = data_offset
        for info in tensors:
            if info.begin != position:
                kind = "a hole" if info.begin > position else "an overlap"
                self.fail(f"{kind}: data begins at byte {info.begin} of the file", f"byte {position}", info.name)
            position = info.end
        if position != file_bytes:
            self.fail(f"{file_bytes - position} bytes after the last tensor", f"a file of {position} bytes")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_header(path: str | os.PathLike[str], error: type[FlashSparseError] = CheckpointError) -> Header:
    """Reads and validates the header of a safetensors file.

    Raises `error` naming file, tensor, found and expected for any malformed field: length, JSON, duplicate keys,
    unknown dtype, shape, offsets, holes, overlaps, trailing bytes, metadata that is not strings.
    """
    reader = _Reader(Path(path), error)
    raw, file_bytes = reader.load()
    entries = reader.parse(raw)
    metadata = reader.metadata(entries.pop("__metadata__", {}))
    data_offset = 8 + len(raw)
    tensors = [reader.tensor(name, entry, data_offset, file_bytes) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    reader.check_cover(tensors, data_offset, file_bytes)
    return Header(Path(path), data_offset, file_bytes, {info.name: info for info in tensors}, metadata)


def read_tensor(header: Header, name: str, start: int = 0, rows: int | None = None) -> np.ndarray:
    """Rows [start, start + rows) of a tensor along its first axis (all by default) as a new array.

    BF16 comes back as uint16. Raises ValueError for rows outside the tensor, CheckpointError when the file shrank
    since its header was read.
    """
    info = header.tensors[name]
    count = info.shape[0] if info.shape else 1
    rows = count - start if rows is None else rows
    if not 0 <= start <= start + rows <= count:
        raise ValueError(f"{header.path}: tensor {name!r}: rows {start}..{start + rows} of {count}")
    row_bytes = info.nbytes // count if count else 0
    out = np.empty((rows, *info.shape[1:]) if info.shape else (), dtype=numpy_dtype(info.dtype))
    view = out.reshape(-1).view(np.uint8).data
    with open(header.path, "rb", buffering=0) as file:
        file.seek(info.begin + start * row_bytes)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(f"{header.path}: tensor {name!r}: found the end of the file, expected more data")
            done += got
    return out


def storage_order(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Names sorted by item size, largest first, then by name: every tensor is naturally aligned without holes."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))


def check_storage(header: Header) -> None:
    """What packs promise of the files that hold their tensors: data begins at a multiple of ALIGN, in `storage_order`.

    Raises PackError naming the file, and the first tensor that is out of place.
    """
    if header.data_offset % ALIGN:
        raise PackError(f"{header.path}: found data at byte {header.data_offset}, expected a multiple of {ALIGN}")
    order = storage_order({name: (info.dtype, info.shape) for name, info in header.tensors.items()})
    for found, expected in zip(header.tensors, order, strict=True):
        if found != expected:
            raise PackError(
                f"{header.path}: tensor {found!r}: found where {expected!r} belongs, expected tensors sorted by item "
                "size, largest first, then by name"
            )


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], align: int = ALIGN, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length, header and padding of a file whose data holds `tensors` (name -> (dtype, shape)) in the given order.

    Spaces pad the header so that the result's length, and with it the start of the data, is a multiple of `align`.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + shape_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    length = -(-(8 + len(text)) // align) * align - 8
    return struct.pack("<Q", length) + text.ljust(length, b" ")
