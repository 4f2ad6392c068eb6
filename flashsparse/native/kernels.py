"""The CPU kernels as Python calls: shapes, types and contiguity are checked here, the rest is C++.

All operands are C-contiguous float32 numpy arrays unless a docstring says otherwise; results are written into the
caller's arrays. Addresses handed in (weights, records) must stay alive during the call. Wrong operands: ValueError.
"""

from __future__ import annotations

import ctypes
from types import TracebackType

import numpy as np

from flashsparse.errors import NativeLibraryError, SessionError
from flashsparse.native.library import CMatrix, CRecord, lib, process

DTYPES = {"F32": 0, "F16": 1, "BF16": 2, "Q8": 3, "Q4": 4, "Q1": 5, "Q2": 6, "Q3": 7}
ACTIVATIONS = {"silu": 0, "relu": 1, "relu2": 2, "fatrelu": 3, "drelu": 4}
_BITS = {DTYPES[name]: int(name[1]) for name in DTYPES if name[0] == "Q"}
_LOW = {dtype for dtype, bits in _BITS.items() if bits < 4}  # only score() computes with these
_FLOATS = (DTYPES["F32"], DTYPES["F16"], DTYPES["BF16"])
_GROUPS = (32, 64, 128)
_CACHE_TYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}


def bits(dtype: str) -> int:
    """Bits of one stored value of a type of DTYPES, without scales and biases."""
    return _BITS.get(DTYPES[dtype], 32 if dtype == "F32" else 16)


class Workers:
    """Compute threads, the caller's among them. One call at a time uses them; use as a context manager or close().

    Belongs to the process that made it: a fork has none of the threads, and using it there raises SessionError.
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self.threads, self.closed, self._process = threads, False, process()
        self._handle = lib().fs_workers_create(threads)
        if not self._handle:
            raise NativeLibraryError(f"cannot start {threads} compute threads")

    @property
    def handle(self) -> int:
        """What the library knows them by. Raises ValueError when closed, SessionError in a fork."""
        if self._process != process():
            raise SessionError("the compute threads were created before fork; load the pack again in this process")
        if self.closed:
            raise ValueError("these workers are closed")
        return self._handle

    def close(self) -> None:
        """Wait for a call that another thread is inside, then stop the threads. Idempotent; later calls are refused."""
        self.closed = True
        if self._process == process():
            lib().fs_workers_stop(self._handle)

    def __del__(self) -> None:
        # Only here is nobody inside a call: a caller holds the workers.
        if getattr(self, "_handle", None) and self._process == process():
            lib().fs_workers_destroy(self._handle)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Matrix:
    """The C view of a stored matrix [rows, cols], row-contiguous. `keep` is held as long as the view.

    Q1 to Q8: MLX's affine layout, a row's values a little-endian bit stream; scales and biases are
    [rows, cols / group_size] of `scale_dtype`.
    """

    def __init__(
        self,
        address: int,
        rows: int,
        cols: int,
        dtype: int,
        scales_address: int = 0,
        biases_address: int = 0,
        scale_dtype: int = 0,
        group_size: int = 0,
        keep: object = None,
    ) -> None:
        _check_format(dtype, scale_dtype, group_size, cols)
        if rows < 0 or cols < 0 or not address or (dtype in _BITS and not (scales_address and biases_address)):
            raise ValueError(f"matrix [{rows}, {cols}] of type {dtype} lacks an address or has a negative size")
        self.rows, self.cols, self.keep = rows, cols, keep
        self.c = CMatrix(address, scales_address, biases_address, rows, cols, dtype, scale_dtype, group_size, 0)
        self.reference = ctypes.byref(self.c)


class Record:
    """The layout of a record: byte offsets of its fields (-1: absent), d values a vector. `param`: FATReLU's limit."""

    def __init__(
        self,
        *,
        gate: int = -1,
        gate_bias: int = -1,
        up: int = -1,
        up_bias: int = -1,
        down: int,
        d: int,
        dtype: int,
        scale_dtype: int = 0,
        group_size: int = 0,
        activation: int,
        param: float = 0.0,
        gated: bool,
    ) -> None:
        _check_format(dtype, scale_dtype, group_size, d)
        if dtype in _LOW:
            raise ValueError(f"records of {_BITS[dtype]}-bit vectors are not supported; 4 and 8 bits are")
        if activation not in ACTIVATIONS.values():
            raise ValueError(f"activation {activation} is none of {ACTIVATIONS}")
        if down < 0 or (gated and up < 0):
            raise ValueError("a record needs a down vector, and an up row when it is gated")
        scale_dtype = scale_dtype if dtype in _BITS else dtype
        self.d, self.dtype, self.gated = d, dtype, gated
        self.c = CRecord(
            gate, gate_bias, up, up_bias, down, d, dtype, scale_dtype, group_size, activation, param, int(gated)
        )
        self.reference = ctypes.byref(self.c)
        self.scores = gate >= 0 if gated else up >= 0
        self.bytes = max(_field_end(self.c, at) for at in (gate, up, down))


def _check_format(dtype: int, scale_dtype: int, group_size: int, cols: int) -> None:
    if dtype in _BITS:
        if scale_dtype not in _FLOATS or group_size not in _GROUPS or cols % group_size:
            raise ValueError(f"quantized rows of {cols}: group size {group_size}, scale type {scale_dtype}")
    elif dtype not in _FLOATS:
        raise ValueError(f"type {dtype} is none of {DTYPES}")


def _field_end(c: CRecord, at: int) -> int:
    """The byte after the vector that begins at `at`."""
    if at < 0:
        return 0
    if c.dtype in _BITS:
        return at + c.d * _BITS[c.dtype] // 8 + 2 * (c.d // c.group_size) * (4 if c.scale_dtype == 0 else 2)
    return at + c.d * (4 if c.dtype == 0 else 2)


def _address(array: np.ndarray, dtype: type, shape: tuple[int, ...], name: str) -> int:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a contiguous {np.dtype(dtype).name} array of shape {shape}, "
            f"found {array.dtype} {array.shape}{'' if array.flags.c_contiguous else ', not contiguous'}"
        )
    return data_address(array)


def data_address(array: np.ndarray) -> int:
    """Where the array's values begin. `array.ctypes` says the same four times slower, many times in each layer."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    except (TypeError, ValueError):  # read-only or empty
        return array.ctypes.data


_UNSIGNED: dict[str, type] = {"i": np.uint32, "l": np.uint64, "q": np.uint64}


def _check_below(numbers: np.ndarray, limit: int, name: str) -> None:
    """Raise ValueError unless all are in 0..limit-1. Seen as unsigned, negative numbers are larger than any limit."""
    kind = _UNSIGNED.get(numbers.dtype.char)
    if kind is not None and len(numbers) and numbers.flags.c_contiguous and int(numbers.view(kind).max()) < limit:
        return
    if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= limit):
        raise ValueError(f"{name}: {int(numbers.min())}..{int(numbers.max())} are not all in 0..{limit - 1}")


def _check_product(matrix: Matrix) -> None:
    if matrix.c.dtype in _LOW:
        raise ValueError(f"a {_BITS[matrix.c.dtype]}-bit matrix can only be scored with")


def memory_read(workers: Workers, buffer: np.ndarray) -> int:
    """The exclusive or of a buffer's 64-bit words (a multiple of 256 bytes), read in order on all threads.

    What only reads cannot be faster: the ceiling of every kernel.
    """
    if buffer.nbytes % 256 or not buffer.flags.c_contiguous:
        raise ValueError(f"expected a contiguous buffer of a multiple of 256 bytes, found {buffer.nbytes}")
    return int(lib().fs_memory_read(workers.handle, buffer.ctypes.data, buffer.nbytes))


def touch(buffer: np.ndarray) -> None:
    """Have the system give the pages of `buffer` now; its bytes stay, also those that others write meanwhile."""
    lib().fs_touch(buffer.ctypes.data, buffer.nbytes)


def linear(workers: Workers, matrix: Matrix, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
    """out[T, rows] = x[T, cols] · matrixᵀ + bias[rows]. A row's bits do not depend on T or on the threads."""
    _check_product(matrix)
    tokens = len(x)
    at = _address(x, np.float32, (tokens, matrix.cols), "x")
    to = _address(out, np.float32, (tokens, matrix.rows), "out")
    extra = None if bias is None else _address(bias, np.float32, (matrix.rows,), "bias")
    lib().fs_linear(workers.handle, matrix.reference, extra, at, tokens, to)


def score(workers: Workers, matrix: Matrix, bias: np.ndarray | None, x: np.ndarray, out: np.ndarray) -> None:
    """out[T, rows] = x[T, cols] · matrixᵀ + bias[rows] for a matrix of 1, 2, 3 or 4 bits and x rounded to int8.

    Each group of a token is rounded half to even to multiples of its max |x| / 127; a group of zeros, or whose step is
    subnormal, counts as zero. A token that holds NaN or Inf scores NaN everywhere. The bits of a score depend on its
    row and its token only.
    """
    if _BITS.get(matrix.c.dtype, 8) > 4:
        raise ValueError(f"scores need a matrix of 1 to 4 bits, not of type {matrix.c.dtype}")
    tokens = len(x)
    at = _address(x, np.float32, (tokens, matrix.cols), "x")
    to = _address(out, np.float32, (tokens, matrix.rows), "out")
    extra = None if bias is None else _address(bias, np.float32, (matrix.rows,), "bias")
    lib().fs_score(workers.handle, matrix.reference, extra, at, tokens, to)


def gather(matrix: Matrix, ids: np.ndarray, out: np.ndarray) -> None:
    """out[n, cols] = rows `ids` [n] (int32) of the matrix as float32."""
    _check_product(matrix)
    n = len(ids)
    rows = _address(ids, np.int32, (n,), "ids")
    to = _address(out, np.float32, (n, matrix.cols), "out")
    _check_below(ids, matrix.rows, "ids")
    lib().fs_gather(matrix.reference, rows, n, to)


def _cache_address(cache: np.ndarray, dtype: str, name: str) -> int:
    stored = _CACHE_TYPES.get(dtype)
    if cache.dtype != stored or cache.ndim != 3 or not cache.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected a contiguous [KVH, capacity, hd] of {dtype}, found {cache.dtype} {cache.shape}"
        )
    return cache.ctypes.data


def attention(
    workers: Workers,
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    kv_dtype: str,
    offset: int,
    window: int,
    scale: float,
    out: np.ndarray,
) -> None:
    """Causal attention of q [T, H, hd], at positions offset.., over keys and values [KVH, capacity, hd].

    kv_dtype: "F32", "F16" or "BF16" (as uint16). The cache must already hold positions 0..offset+T-1. A window > 0 is
    how many positions one sees, itself included.
    """
    if q.ndim != 3 or keys.shape != values.shape:
        raise ValueError(f"q {q.shape}, keys {keys.shape}, values {values.shape}")
    tokens, heads, size = q.shape
    at, to = _address(q, np.float32, q.shape, "q"), _address(out, np.float32, q.shape, "out")
    k, v = _cache_address(keys, kv_dtype, "keys"), _cache_address(values, kv_dtype, "values")
    kv_heads, capacity, cached = keys.shape
    if cached != size or heads % kv_heads or offset < 0 or offset + tokens > capacity or window < 0:
        raise ValueError(f"q {q.shape} at position {offset}, window {window}, does not fit a cache {keys.shape}")
    lib().fs_attention(
        workers.handle, at, k, v, DTYPES[kv_dtype], tokens, heads, kv_heads, size, capacity, offset, window, scale, to
    )


def kv_append(new: np.ndarray, cache: np.ndarray, kv_dtype: str, offset: int) -> None:
    """Write new [T, KVH, hd] into cache [KVH, capacity, hd] at positions offset.., rounded to nearest even."""
    to = _cache_address(cache, kv_dtype, "cache")
    kv_heads, capacity, size = cache.shape
    tokens = len(new)
    at = _address(new, np.float32, (tokens, kv_heads, size), "new")
    if offset < 0 or offset + tokens > capacity:
        raise ValueError(f"positions {offset}..{offset + tokens - 1} do not fit a cache of {capacity}")
    lib().fs_kv_append(at, to, DTYPES[kv_dtype], tokens, kv_heads, size, capacity, offset)


def activate(scores: np.ndarray, activation: int, param: float = 0.0) -> None:
    """Apply the activation in place, to any shape. DReLU: relu, the gate's half of it."""
    if activation not in ACTIVATIONS.values():
        raise ValueError(f"activation {activation} is none of {ACTIVATIONS}")
    lib().fs_activate(_address(scores, np.float32, scores.shape, "scores"), scores.size, activation, param)


def active(activated: np.ndarray) -> np.ndarray:
    """Ascending neurons (int32) whose value in activated [T, I] is not zero for some token; NaN counts as active."""
    if activated.ndim != 2:
        raise ValueError(f"activated: expected [T, I], found {activated.shape}")
    at = _address(activated, np.float32, activated.shape, "activated")
    ids = np.empty(activated.shape[1], np.int32)
    return ids[: lib().fs_active(at, *activated.shape, ids.ctypes.data)]


def select(scores: np.ndarray, threshold: float, k: int | None, mask: np.ndarray, ids: np.ndarray) -> int:
    """mask[T, I] (uint8) becomes 1 where scores [T, I] are not below the threshold, NaN included, else 0.

    With k, only a token's k largest scores may be selected: NaN counts as the largest, of equals the lower neuron comes
    first. ids [I] (int32) begins with the ascending neurons that some token selects; returns how many there are.
    """
    if scores.ndim != 2 or (k is not None and k < 1):
        raise ValueError(f"scores {scores.shape}: expected [T, I]; k {k}: expected None or at least 1")
    at = _address(scores, np.float32, scores.shape, "scores")
    to = _address(mask, np.uint8, scores.shape, "mask")
    numbers = _address(ids, np.int32, (scores.shape[1],), "ids")
    if k is None:
        return int(lib().fs_select(at, *scores.shape, threshold, to, numbers))
    return int(lib().fs_select_topk(at, *scores.shape, k, threshold, to, numbers))


def _records(
    record: Record, slab: np.ndarray, offsets: np.ndarray, cols: np.ndarray, hidden: np.ndarray
) -> tuple[int, int, int, int]:
    """Addresses of the slab, offsets and columns, and the number of records, all within their arrays."""
    n = len(offsets)
    base = _address(slab, np.uint8, slab.shape, "slab")
    _check_below(cols, hidden.shape[1], "cols")
    _check_below(offsets, slab.size - record.bytes + 1, f"offsets of records of {record.bytes} bytes in the slab")
    return base, _address(offsets, np.int64, (n,), "offsets"), _address(cols, np.int32, (n,), "cols"), n


def ffn_hidden(
    workers: Workers,
    record: Record,
    slab: np.ndarray,
    offsets: np.ndarray,
    ids: np.ndarray,
    cols: np.ndarray,
    x: np.ndarray,
    activated: np.ndarray | None,
    mask: np.ndarray | None,
    hidden: np.ndarray,
) -> None:
    """hidden[T, cols[j]] becomes the intermediate value of the record that begins at slab[offsets[j]].

    cols [n] int32, offsets [n] int64, slab uint8, x [T, d]. activated [T, I] holds the activated gates of all neurons,
    ids [n] (int32) says which are these; None: gates are computed from the records. A gate of exactly zero gives zero,
    whatever the record holds. Where mask [T, I] (uint8; None: all ones) is 0 the value is exactly zero, not computed.
    """
    tokens, width = hidden.shape
    base, starts, columns, n = _records(record, slab, offsets, cols, hidden)
    numbers = _address(ids, np.int32, (n,), "ids")
    at = _address(x, np.float32, (tokens, record.d), "x")
    to = _address(hidden, np.float32, (tokens, width), "hidden")
    gates, marks, neurons = _per_neuron(tokens, ids, activated, mask)
    if gates is None and not record.scores:
        raise ValueError("activated is needed: the record has no row to score with")
    lib().fs_ffn_hidden(
        workers.handle,
        record.reference,
        base,
        starts,
        numbers,
        columns,
        n,
        at,
        tokens,
        gates,
        marks,
        neurons,
        to,
        width,
    )


def _per_neuron(
    tokens: int, ids: np.ndarray, activated: np.ndarray | None, mask: np.ndarray | None
) -> tuple[int | None, int | None, int]:
    """Addresses of what is given of activated and mask, both [T, I], and I (0: neither is given)."""
    given = next((array for array in (activated, mask) if array is not None), None)
    if given is None:
        return None, None, 0
    if given.ndim != 2:
        raise ValueError(f"activated, mask: expected [T, I], found {given.shape}")
    shape = (tokens, given.shape[1])
    _check_below(ids, given.shape[1], "ids")
    gates = None if activated is None else _address(activated, np.float32, shape, "activated")
    return gates, None if mask is None else _address(mask, np.uint8, shape, "mask"), given.shape[1]


def ffn_down(
    workers: Workers,
    record: Record,
    slab: np.ndarray,
    offsets: np.ndarray,
    cols: np.ndarray,
    hidden: np.ndarray,
    y: np.ndarray,
) -> None:
    """y[T, d] += Σ_j hidden[T, cols[j]] · down_j, one addition after the other in the order given, zeros skipped."""
    tokens, width = hidden.shape
    base, starts, columns, n = _records(record, slab, offsets, cols, hidden)
    at = _address(hidden, np.float32, (tokens, width), "hidden")
    to = _address(y, np.float32, (tokens, record.d), "y")
    lib().fs_ffn_down(workers.handle, record.reference, base, starts, columns, n, at, width, tokens, to)
