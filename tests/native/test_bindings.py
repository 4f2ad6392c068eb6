"""The bindings refuse operands that the C side would misread, and say what is wrong with the library."""

from __future__ import annotations

import numpy as np
import pytest

from flashsparse import NativeLibraryError, native
from flashsparse.native import library


@pytest.fixture
def workers() -> native.Workers:
    with native.Workers(1) as some:
        yield some


def matrix(rows: int = 3, cols: int = 16) -> native.Matrix:
    data = np.zeros((rows, cols), np.float32)
    return native.Matrix(data.ctypes.data, rows, cols, native.DTYPES["F32"], keep=data)


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def test_variant_by_name() -> None:
    best = native.isa()
    native.set_isa("portable")
    assert native.isa() == "portable"
    native.set_isa(best)
    with pytest.raises(ValueError, match="sse9"):
        native.set_isa("sse9")
    assert native.isa() == best


@pytest.mark.parametrize(
    ("x", "out", "bias"),
    [
        (zeros(2, 15), zeros(2, 3), None),
        (zeros(2, 16), zeros(1, 3), None),
        (zeros(2, 16, dtype=np.float64), zeros(2, 3), None),
        (zeros(2, 32)[:, ::2], zeros(2, 3), None),
        (zeros(2, 16), zeros(2, 3), zeros(4)),
    ],
)
def test_linear_refuses(workers: native.Workers, x: np.ndarray, out: np.ndarray, bias: np.ndarray | None) -> None:
    with pytest.raises(ValueError, match="expected a contiguous float32"):
        native.linear(workers, matrix(), bias, x, out)


def test_gather_refuses_ids_out_of_range() -> None:
    for ids in ([3], [-1]):
        with pytest.raises(ValueError, match="ids"):
            native.gather(matrix(), np.array(ids, np.int32), zeros(1, 16))


def test_matrix_refuses_wrong_quantization() -> None:
    with pytest.raises(ValueError, match="group size 48"):
        native.Matrix(4096, 1, 96, native.DTYPES["Q4"], 4096, 4096, native.DTYPES["F16"], 48)
    with pytest.raises(ValueError, match="address"):
        native.Matrix(4096, 1, 64, native.DTYPES["Q4"], 0, 0, native.DTYPES["F16"], 64)
    with pytest.raises(ValueError, match="type 9"):
        native.Matrix(4096, 1, 64, 9)


def test_records_refuse_what_lies_outside(workers: native.Workers) -> None:
    record = native.Record(up=0, down=64, d=16, dtype=0, activation=1, gated=True)
    slab, hidden, y = zeros(256, dtype=np.uint8), zeros(1, 2), zeros(1, 16)

    def down(offsets: list[int], cols: list[int]) -> None:
        native.ffn_down(workers, record, slab, np.array(offsets, np.int64), np.array(cols, np.int32), hidden, y)

    down([0, 128], [0, 1])
    for offsets, cols in (([129], [0]), ([-1], [0]), ([0], [2]), ([0], [-1])):
        with pytest.raises(ValueError, match="not all in"):
            down(offsets, cols)
    with pytest.raises(ValueError, match="activated is needed"):
        nothing = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32)
        native.ffn_hidden(workers, record, slab, *nothing, zeros(1, 16), None, None, hidden)


def low(bits: int, rows: int = 3, cols: int = 64) -> native.Matrix:
    words, parts = zeros(rows, cols * bits // 32, dtype=np.uint32), zeros(rows, cols // 64)
    at = parts.ctypes.data
    return native.Matrix(words.ctypes.data, rows, cols, native.DTYPES[f"Q{bits}"], at, at, 0, 64, keep=(words, parts))


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_low_bits_are_for_scores_only(workers: native.Workers, bits: int) -> None:
    native.score(workers, low(bits), None, zeros(2, 64), zeros(2, 3))
    with pytest.raises(ValueError, match=f"a {bits}-bit matrix can only be scored with"):
        native.linear(workers, low(bits), None, zeros(2, 64), zeros(2, 3))
    with pytest.raises(ValueError, match=f"a {bits}-bit matrix can only be scored with"):
        native.gather(low(bits), zeros(1, dtype=np.int32), zeros(1, 64))
    with pytest.raises(ValueError, match=f"records of {bits}-bit vectors"):
        native.Record(up=0, down=64, d=64, dtype=native.DTYPES[f"Q{bits}"], group_size=64, activation=1, gated=True)


def test_score_refuses(workers: native.Workers) -> None:
    for matrix_ in (matrix(), low(8)):
        with pytest.raises(ValueError, match="1 to 4 bits"):
            native.score(workers, matrix_, None, zeros(2, matrix_.cols), zeros(2, 3))
    with pytest.raises(ValueError, match="group size 64"):
        low(2, cols=96)
    for x, out, bias in (
        (zeros(2, 32), zeros(2, 3), None),
        (zeros(2, 64), zeros(2, 4), None),
        (zeros(2, 64), zeros(2, 3), zeros(2)),
        (zeros(2, 64, dtype=np.float16), zeros(2, 3), None),
    ):
        with pytest.raises(ValueError, match="expected a contiguous float32"):
            native.score(workers, low(2), bias, x, out)


def test_masks_are_checked(workers: native.Workers) -> None:
    record = native.Record(gate=0, up=64, down=128, d=16, dtype=0, activation=1, gated=True)
    slab, one = zeros(256, dtype=np.uint8), np.zeros(1, np.int32)

    def hidden(activated: np.ndarray | None, mask: np.ndarray | None, neuron: int = 0) -> None:
        ids, x, out = np.array([neuron], np.int32), zeros(2, 16), zeros(2, 1)
        native.ffn_hidden(workers, record, slab, np.zeros(1, np.int64), ids, one, x, activated, mask, out)

    hidden(zeros(2, 5), zeros(2, 5, dtype=np.uint8))
    hidden(None, zeros(2, 5, dtype=np.uint8), 4)
    for activated, mask in (
        (None, zeros(3, 5, dtype=np.uint8)),
        (zeros(2, 5), zeros(2, 4, dtype=np.uint8)),
        (None, zeros(2, 5, dtype=np.bool_)),
    ):
        with pytest.raises(ValueError, match="mask: expected a contiguous uint8"):
            hidden(activated, mask)
    with pytest.raises(ValueError, match="ids: 5"):
        hidden(None, zeros(2, 5, dtype=np.uint8), 5)
    with pytest.raises(ValueError, match=r"expected \[T, I\]"):
        hidden(None, zeros(5, dtype=np.uint8))


def test_attention_refuses_positions_beyond_the_cache(workers: native.Workers) -> None:
    cache = zeros(1, 4, 8, dtype=np.float16)
    with pytest.raises(ValueError, match="does not fit"):
        native.attention(workers, zeros(2, 1, 8), cache, cache, "F16", 3, 0, 1.0, zeros(2, 1, 8))
    with pytest.raises(ValueError, match="positions 4"):
        native.kv_append(zeros(1, 1, 8), cache, "F16", 4)
    with pytest.raises(ValueError, match="BF16"):
        native.kv_append(zeros(1, 1, 8), cache, "BF16", 0)


def test_closed_workers_are_refused() -> None:
    workers = native.Workers(2)
    workers.close()
    workers.close()
    with pytest.raises(ValueError, match="closed"):
        native.linear(workers, matrix(), None, zeros(1, 16), zeros(1, 3))


def test_missing_and_foreign_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FILE_NAME", "libmissing.so")
    with pytest.raises(NativeLibraryError, match=r"libmissing\.so is missing; build it"):
        library.lib.__wrapped__()
    monkeypatch.setattr(library, "FILE_NAME", "library.py")
    with pytest.raises(NativeLibraryError, match="cannot be loaded"):
        library.lib.__wrapped__()


def test_other_interface_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.ABI_VERSION
    monkeypatch.setattr(library, "ABI_VERSION", 0)
    with pytest.raises(NativeLibraryError, match=f"interface version {found}, expected 0"):
        library.lib.__wrapped__()
