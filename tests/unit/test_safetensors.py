"""Safetensors headers: one test per malformed field, golden bytes, and agreement with the safetensors library."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashsparse.errors import CheckpointError, PackError
from flashsparse.pack.safetensors import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    header_bytes,
    read_header,
    read_tensor,
    storage_order,
)

Entry = dict[str, Any]
GOOD: dict[str, Entry] = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def write(header: Any, data: int = 24, length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))
        return path

    return write


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with other fields of tensor `b`."""
    return {"a": GOOD["a"], "b": GOOD["b"] | changes}


def fails(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    for part in (str(path), "found", "expected", *parts):
        assert part in str(caught.value)


def test_reads_a_good_file(make: Callable[..., Path]) -> None:
    path = make({"__metadata__": {"format": "pt"}, **GOOD})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b"]
    b = header.tensors["b"]
    assert (b.dtype, b.shape, b.nbytes) == ("BF16", (4,), 8)
    assert (
        (b.begin, b.end)
        == (header.data_offset + 16, header.data_offset + 24)
        == (header.file_bytes - 8, header.file_bytes)
    )


def test_accepts_scalars_empty_tensors_padding_and_any_order(make: Callable[..., Path]) -> None:
    header = {
        "z": {"dtype": "U8", "shape": [], "data_offsets": [4, 5]},
        "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [4, 4]},
        "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    found = read_header(make(json.dumps(header).encode() + b"   ", data=5))
    assert list(found.tensors) == ["y", "none", "z"]
    assert read_tensor(found, "z").shape == ()
    assert read_tensor(found, "none").shape == (0, 7)


def test_file_shorter_than_the_length(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(b"\x01\x02")
    fails(path, "2 bytes")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.write_bytes(b"")
    fails(path, "0 bytes")


def test_header_longer_than_the_file(make: Callable[..., Path]) -> None:
    fails(make(GOOD, data=0, length=5000), "5000")


def test_header_longer_than_the_cap(make: Callable[..., Path]) -> None:
    fails(make(GOOD, length=2**63), str(2**63), str(MAX_HEADER_BYTES))


def test_truncated_data(make: Callable[..., Path]) -> None:
    fails(make(GOOD, data=20), "tensor 'b'", "[16, 24]", "20")


@pytest.mark.parametrize("text", [b'{"a": ', b"{}x", b"\xff\xfe{}", b'{"a": NaN}', b'{"a": ' + b"[" * 50000])
def test_not_json(make: Callable[..., Path], text: bytes) -> None:
    path = make(text, data=0)
    with pytest.raises(CheckpointError, match="header"):
        read_header(path)


@pytest.mark.parametrize("text", [b"", b" {}", b"[]", b'"a"'])
def test_does_not_start_with_a_brace(make: Callable[..., Path], text: bytes) -> None:
    fails(make(text, data=0), "'{'")


def test_duplicate_tensor(make: Callable[..., Path]) -> None:
    entry = json.dumps(GOOD["a"])
    fails(make(f'{{"a": {entry}, "a": {entry}}}'.encode(), data=16), "'a' twice")


def test_duplicate_field(make: Callable[..., Path]) -> None:
    text = b'{"a": {"dtype": "U8", "shape": [1], "shape": [1], "data_offsets": [0, 1]}}'
    fails(make(text, data=1), "'shape' twice")


def test_hole(make: Callable[..., Path]) -> None:
    fails(make(changed(data_offsets=[20, 28]), data=28), "tensor 'b'", "a hole")


def test_overlap(make: Callable[..., Path]) -> None:
    fails(make(changed(data_offsets=[12, 20]), data=20), "tensor 'b'", "an overlap")


def test_hole_at_the_start(make: Callable[..., Path]) -> None:
    fails(make({"a": GOOD["a"] | {"data_offsets": [4, 20]}}, data=20), "tensor 'a'", "a hole")


def test_offsets_out_of_range(make: Callable[..., Path]) -> None:
    fails(make(changed(data_offsets=[16, 32], shape=[8])), "tensor 'b'", "[16, 32]", "24")


def test_offsets_reversed(make: Callable[..., Path]) -> None:
    fails(make(changed(data_offsets=[24, 16])), "tensor 'b'", "[24, 16]")


@pytest.mark.parametrize("offsets", [[16], [16, 24, 32], [16.0, 24.0], [-8, 0], "16", [True, 24], None])
def test_offsets_of_a_wrong_type(make: Callable[..., Path], offsets: Any) -> None:
    fails(make(changed(data_offsets=offsets)), "tensor 'b'", "data_offsets")


def test_trailing_bytes(make: Callable[..., Path]) -> None:
    fails(make(GOOD, data=25), "1 bytes after the last tensor")


def test_no_tensors_but_data(make: Callable[..., Path]) -> None:
    fails(make({}, data=3), "3 bytes after the last tensor")


@pytest.mark.parametrize(("shape", "dtype"), [([3], "BF16"), ([4], "F32"), ([2, 3], "BF16"), ([0], "BF16")])
def test_shape_does_not_fit_the_data(make: Callable[..., Path], shape: list[int], dtype: str) -> None:
    fails(make(changed(shape=shape, dtype=dtype)), "tensor 'b'", "8 bytes of data", str(shape))


@pytest.mark.parametrize("dtype", ["F31", "bf16", 7, None, ["F32"]])
def test_unknown_dtype(make: Callable[..., Path], dtype: Any) -> None:
    fails(make(changed(dtype=dtype)), "tensor 'b'", repr(dtype), "BF16")


@pytest.mark.parametrize("shape", [[-4], [4.0], ["4"], [True], 4, None, [[4]]])
def test_negative_or_wrong_shape(make: Callable[..., Path], shape: Any) -> None:
    fails(make(changed(shape=shape)), "tensor 'b'", repr(shape), "integers >= 0")


@pytest.mark.parametrize("shape", [[2**63], [2**32, 2**32], [2**62, 2, 1]])
def test_shape_that_overflows(make: Callable[..., Path], shape: list[int]) -> None:
    fails(make(changed(shape=shape)), "tensor 'b'", str(shape), str(2**63 - 1))


def test_number_with_too_many_digits(make: Callable[..., Path]) -> None:
    text = b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}'
    fails(make(text, data=1), "not JSON")


@pytest.mark.parametrize("entry", [{"dtype": "U8"}, {**GOOD["b"], "extra": 1}, [], "b", None])
def test_wrong_fields(make: Callable[..., Path], entry: Any) -> None:
    fails(make({"a": GOOD["a"], "b": entry}), "tensor 'b'", "dtype, shape, data_offsets")


@pytest.mark.parametrize("value", [1, None, ["x"], {"x": "y"}])
def test_metadata_that_is_no_string(make: Callable[..., Path], value: Any) -> None:
    fails(make({"__metadata__": {"key": value}, **GOOD}), "__metadata__ 'key'")


def test_metadata_that_is_no_object(make: Callable[..., Path]) -> None:
    fails(make({"__metadata__": "pt", **GOOD}), "__metadata__")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_header(path)


def test_error_type_is_the_callers(make: Callable[..., Path]) -> None:
    with pytest.raises(PackError):
        read_header(make(GOOD, data=25), PackError)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 250))
def test_random_bytes_never_raise_anything_else(tmp_path_factory: Any, data: bytes, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + data)
    with suppress(CheckpointError):
        assert read_header(path).tensors == {}


def test_header_golden_bytes() -> None:
    text = (
        b'{"w":{"dtype":"U32","shape":[2,3],"data_offsets":[0,24]},'
        b'"n":{"dtype":"BF16","shape":[1],"data_offsets":[24,26]}}'
    )
    expected = struct.pack("<Q", 248) + text + b" " * (248 - len(text))
    assert header_bytes({"w": ("U32", (2, 3)), "n": ("BF16", (1,))}, align=256) == expected


@pytest.mark.parametrize("count", [0, 1, 300])
def test_written_headers_are_read_back_and_aligned(tmp_path: Path, count: int) -> None:
    tensors = {f"tensor.{i}": ("F16", (i, 2)) for i in range(count)}
    data = sum(4 * i for i in range(count))
    path = tmp_path / "out.safetensors"
    path.write_bytes(header_bytes(tensors) + bytes(data))
    header = read_header(path)
    assert header.data_offset % 16384 == 0
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == tensors


def test_other_readers_open_our_files(tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    path = tmp_path / "out.safetensors"
    path.write_bytes(header_bytes({"w": ("F16", (2, 3))}) + values.tobytes())
    np.testing.assert_array_equal(load_file(path)["w"], values)


def test_we_open_other_writers_files(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    values = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.int64([1, 2])}
    save_file(values, tmp_path / "in.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "in.safetensors")
    np.testing.assert_array_equal(read_tensor(header, "x"), values["x"])
    np.testing.assert_array_equal(read_tensor(header, "x", 1, 2), values["x"][1:])
    np.testing.assert_array_equal(read_tensor(header, "y"), values["y"])
    for rows in ((3, 1), (-1, 2), (0, 4)):
        with pytest.raises(ValueError, match="rows"):
            read_tensor(header, "x", *rows)


def test_reading_a_file_that_shrank(make: Callable[..., Path]) -> None:
    path = make(GOOD)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="'b'"):
        read_tensor(header, "b")


def test_storage_order_keeps_natural_alignment() -> None:
    tensors = {"c": ("BF16", (3,)), "b": ("U32", (1,)), "a": ("F16", (5,)), "d": ("F32", (1,))}
    assert storage_order(tensors) == ["b", "d", "a", "c"]
    assert set(ITEM_BYTES.values()) == {1, 2, 4, 8}
